"""The workflows of an application in a browser: what is stuck and why, and every call to mend it.

    pip install bottle
    python examples/console.py app:drive          # `drive` in your app.py; then open http://127.0.0.1:8080/

That one answers this computer alone. Where others are to use it, mount it behind your application's own login:

    app.mount("/ops/", make_app(drive, hosts=("ops.example.com",), secret=os.environ["CONSOLE_SECRET"]))

It has one file, no script, and loads nothing from elsewhere. Nothing changes without a form of its own, what comes from
the tables is escaped, and a page reads no more than the newest 10,000 rows of a kind, whatever the tables hold.
"""

import argparse
import base64
import functools
import hashlib
import hmac
import html
import json
import pkgutil
import re
import secrets
import sys
from collections import Counter, defaultdict
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from socketserver import ThreadingMixIn
from urllib.parse import parse_qsl, urlencode
from wsgiref.simple_server import WSGIServer, make_server

import bottle
from bottle import HTTPError, HTTPResponse, request
from peewee import SQL, Case, DoesNotExist, PeeweeException, fn

from geneva_drive import GenevaDrive, GenevaDriveError, StepExecution, Workflow, WorkflowSignal

HOSTS = ("localhost", "127.0.0.1", "[::1]")
STATES = ("ready", "performing", "paused", "finished", "canceled")
CALLS = {  # and the states that allow each
    "resume": ("paused",),
    "resume_at": ("paused", "finished", "canceled"),
    "skip": ("ready", "paused"),
    "pause": ("ready", "performing"),
    "cancel": ("ready", "performing", "paused"),
    "reschedule": ("ready", "paused"),
    "signal": ("ready", "performing", "paused"),
}
WHATEVER_STEP = ("pause", "cancel", "signal")  # the others are about the step that was shown, and no other one
SELECTIONS = {
    "state": "",
    "type": "",
    "hero": "User:7",
    "step": "that it stands at",
    "error": "text in the last",
    "why": "in the reason",
    "waiting_for": "a signal",
    "older_than": "2h",
    "parent": "the id of one",
}
GROUP_CALLS = ("resume", "skip", "cancel")
FORMS = {  # calls, and what they are given
    ("resume", "skip", "pause", "cancel"): ("reason",),
    ("resume_at",): ("step", "reason"),
    ("reschedule",): ("when",),
    ("signal",): ("signal", "payload", "key"),
}
WHY = "why, for others"
MOMENT = "%Y-%m-%d %H:%M:%S"
NEWEST, COUNTED, PER_PAGE, MAX_ATTEMPTS = 10_000, 2000, 50, 50
MAX_CELL, MAX_MESSAGE, MAX_TEXT = 160, 400, 8000  # in characters
COOKIE, MAX_FORM_BYTES = "geneva_drive_console", 1_000_000

# Written as the indexes have it, with literals: SQLite would not see that they apply.
OF, ACTIVE = StepExecution.workflow, StepExecution.state.in_(SQL("('scheduled', 'waiting', 'in_progress')"))
# What a list shows; a context may be large.
LISTED = [getattr(Workflow, name) for name in ("id", "type", "hero_type", "hero_id", "state", "current_step_name")]
LISTED += [Workflow.reason, Workflow.created_at, Workflow.transitioned_at]
KIND = Case(None, [(StepExecution.state == "failed", "failed"), (StepExecution.outcome == "success", "done")], "other")
KINDS = {"wait thin": "waits", "done": "succeeded", "failed": "failed", "paused thin": "is paused"}
KINDS["other"] = "skipped, canceled, to run again, or under way"


def main():
    parser = argparse.ArgumentParser(description="Show an application's workflows in a browser, and mend them there.")
    parser.add_argument("app", help="module:attribute of the drive")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this computer's own)")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--allow", action="append", default=[], metavar="HOST", help="answer to this name, too")
    parser.add_argument("--read-only", action="store_true", help="only show")
    args = parser.parse_args()
    app = make_app(find_drive(args.app, parser), args.read_only, (*HOSTS, *args.allow))
    with make_server(args.host, args.port, app, Server) as server, suppress(KeyboardInterrupt):
        print(f"http://{args.host}:{server.server_port}/", flush=True)
        server.serve_forever()


class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


def find_drive(name, parser):
    sys.path.insert(0, "")
    try:
        drive = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        parser.error(f"{name}: {error}")
    return drive if isinstance(drive, GenevaDrive) else parser.error(f"{name} is no GenevaDrive, but {drive!r:.100}")


# ==== The application, and what it refuses ============================================================================


def make_app(drive, read_only=False, hosts=HOSTS, secret=None):
    """A WSGI application, to be mounted behind a login: whoever reaches it may do what it shows.

    :param read_only: show, and refuse every call.
    :param hosts: the names, without ports, by which browsers may call it: any other Host header is refused.
    :param secret: text or bytes that the tokens of its forms are made from; None takes a random one, so give one where
        several processes answer.
    """
    app = bottle.Bottle()
    key = secret.encode() if isinstance(secret, str) else secret or secrets.token_bytes(32)
    names = {name.lower() for name in hosts}
    app.add_hook("before_request", lambda: check(drive, read_only, names, key))
    app.install(connected)
    app.default_error_handler = lambda error: page("Refused", tag("p", error.body), status=error.status_code)
    app.get("/", callback=overview)
    app.get("/workflows", callback=listed)
    app.get("/workflows/<number:re:[0-9]{1,18}>", callback=shown)
    app.post("/workflows/<number:re:[0-9]{1,18}>/<call>", callback=call_one)
    app.get("/group", callback=preview)
    app.post("/group", callback=call_group)
    return app.wsgi  # the bare application: mounted in another one of Bottle's, the hook would be lost


def check(drive, read_only, hosts, key):
    """Refuse what comes by another name, as by DNS rebinding, and what another site makes a browser send."""
    host = re.sub(r":\d+$", "", request.environ.get("HTTP_HOST", "")).lower()
    if host not in hosts:
        raise HTTPError(421, f"This console does not answer to the name {host!r}: make_app(hosts=...) says to which.")
    session = request.get_cookie(COOKIE) or ""
    session = session if re.fullmatch(r"[\w-]{43}", session, re.ASCII) else secrets.token_urlsafe(32)
    token = hmac.new(key, session.encode(), "sha256").hexdigest()
    request.drive, request.read_only, request.session, request.token = drive, read_only, session, token
    request.now = drive.clock()
    if "%00" in request.query_string:
        raise HTTPError(400, "No text in the tables holds a NUL.")
    if request.method in ("GET", "HEAD"):
        return
    if read_only:
        raise HTTPError(403, "This console only shows.")
    with request.body as sent:
        body = sent.read(MAX_FORM_BYTES + 1)
    if len(body) > MAX_FORM_BYTES:
        raise HTTPError(413, "That form is too large.")
    request.given = dict(parse_qsl(body.decode(errors="replace"), keep_blank_values=True))
    is_ours = hmac.compare_digest(request.given.get("token", "").encode(), token.encode())
    if not is_ours or request.get_header("Sec-Fetch-Site", "same-origin") != "same-origin":
        raise HTTPError(403, "That form is not of this console, or is an old one: go back, reload the page, try again.")


def connected(callback):
    """Give a request a connection to the database, unless the application around has given it one."""

    @functools.wraps(callback)
    def call(**arguments):
        database, is_ours = request.drive.database, False
        try:
            is_ours = database.connect(reuse_if_open=True)
            return callback(**arguments)
        except PeeweeException as error:
            fix = "if tables or columns are missing, drive.create_tables() makes them"
            raise HTTPError(503, f"The database refused: {error}; {fix}") from error
        finally:
            if is_ours and not database.is_closed():
                database.close()

    return call


# ==== The pages =======================================================================================================


def overview():
    groups = sorted(paused_groups(), key=lambda group: -group[3])
    rows = []
    for kind, step, error, number, since in groups[:PER_PAGE]:
        given = {"type": kind, "step": step, "error": error or ""}
        href = url("/workflows", state="paused", **given)
        what = tag("a", f"{number:,} {kind} at {step}: {error or 'no error'}", href=href)
        buttons = [tag("button", call, name="call", value=call) for call in GROUP_CALLS]
        calls = tag("form", *hidden(**given), *buttons, action=url("/group"), class_="row")
        rows.append([what, span(request.now - since), "" if request.read_only else calls])
    paused = table(f"Paused, of the newest {NEWEST:,}, by class, step and error", ["what", "for up to", ""], rows)
    return page("Workflows", counts(groups), paused, refresh=30)


def counts(groups):
    """By class and state, from the newest of each kind: a plus stands where there are more."""
    of_it = [Workflow.select(each).where(Workflow.id == OF) for each in (Workflow.type, Workflow.state)]
    looks = {STATES[:2]: counted(*of_it, StepExecution.select().where(ACTIVE).order_by(OF.desc()))}
    looks[STATES[2:3]] = [(kind, "paused", number) for kind, _, _, number, _ in groups]
    looks[STATES[3:]] = counted(Workflow.type, Workflow.state, newest(Workflow.select()))
    rows, more = defaultdict(Counter), set()
    for states, found in looks.items():
        limit = NEWEST if "paused" in states else COUNTED
        more |= set(states) if sum(number for *_, number in found) >= limit else set()
        for kind, state, number in found:
            rows[kind][state] += number if state in states else 0
    heads = ["class", *STATES]
    cells = [
        [kind, *(count_link(kind, state, each[state], state in more) for state in STATES)]
        for kind, each in sorted(rows.items())
    ]
    return table("By class and state" + f" (+: of the newest {COUNTED:,} there)" * bool(more), heads, cells)


def count_link(kind, state, number, is_more):
    href = url("/workflows", type=kind, state=state)
    return tag("a", f"{number:,}{'+' * is_more}", href=href) if number or is_more else "0"


def listed():
    asked = {name: request.query.getunicode(name, "").strip() for name in (*SELECTIONS, "before")}
    given = {name: value for name, value in asked.items() if value}
    query, key = selected(given)
    if "before" in given:
        query = query.where(key < whole(given["before"]))
    found = list(query.order_by(key.desc()).limit(PER_PAGE + 1))
    more = {**given, "before": found[PER_PAGE - 1].id} if len(found) > PER_PAGE else None
    choices = {"state": ["", *STATES], "type": ["", *sorted({*classes(), given.get("type", "")} - {""})]}
    fields = [field(name, asked[name], hint, choices.get(name)) for name, hint in SELECTIONS.items()]
    buttons = tag("div", tag("button", "show"), tag("a", "all", href=url("/workflows")), class_="row")
    older = tag("p", tag("a", "older ones", href=url("/workflows", **more), rel="next")) if more else ""
    form = tag("form", *fields, buttons, action=url("/workflows"), class_="card fields")
    return page("Workflows, the newest first", form, workflows_table("", found[:PER_PAGE]), older)


def shown(number):
    workflow = Workflow.get_or_none(Workflow.id == number) or missing(number)
    attempts = attempts_of(workflow)
    last, context = attempts[-1], json.dumps(workflow.context, indent=2, ensure_ascii=False)
    words = [tag("ol", *(tag("li", *in_words(each), value=each.number) for each in attempts))]
    failed = [StepExecution.id == each.id for each in attempts if each.error_class_name][-1:]
    traces = [each.error_backtrace for each in StepExecution.select().where(*failed)] if failed else []
    words += [folded("The last traceback", tag("pre", trace[-MAX_TEXT:])) for trace in traces if trace]
    sent = WorkflowSignal.select().where(WorkflowSignal.workflow == number).order_by(WorkflowSignal.id.desc())
    names = ("name", "payload", "created_at", "consumed_at")
    signals = [[in_cell(getattr(each, name)) for name in names] for each in sent.limit(20)]
    children = list(newest(selected({"parent": number})[0]).limit(PER_PAGE))
    return page(
        f"{workflow.type} {number}",
        card("", *facts(workflow), legend(KINDS), timeline(workflow, attempts, request.now)),
        "" if request.read_only else forms(workflow, children),
        card("Attempts" if attempts[0].number == 1 else f"The last {MAX_ATTEMPTS} of {last.number:,} attempts", *words),
        card("Context", tag("pre", context[:MAX_TEXT])) if workflow.context else "",
        table("The newest signals", ["signal", "payload", "sent", "consumed"], signals) if signals else "",
        workflows_table("The newest children", children) if children else "",
    )


def facts(workflow):
    """What stands above the timeline."""
    hero, parent = (workflow.hero_type, workflow.hero_id), workflow.parent_id
    at = [" at ", tag("bdi", workflow.current_step_name)] if workflow.current_step_name else []
    at += [" since ", moment(workflow.transitioned_at)] if workflow.transitioned_at else []
    yield tag("p", badge(workflow.state), *at, ", to pause when this step ends" * workflow.pause_requested)
    yield tag("p", *map(cut, reasons([workflow]).values()), class_=workflow.state, dir="auto")
    about = tag("a", " ".join(hero), href=url("/workflows", hero=":".join(hero))) if all(hero) else "no hero"
    of = (", child of ", tag("a", parent, href=url(f"/workflows/{parent}"))) if parent else ()
    yield tag("p", about, *of, ", created ", moment(workflow.created_at), class_="note")


def forms(workflow, children):
    """One for all calls that take a reason alone, and one for each other, of those that the state allows."""
    steps = type(workflow).steps
    choices = {"step": [each.name for each in steps], "signal": sorted({each.wait_for for each in steps} - {None})}
    values = {"step": workflow.current_step_name, "payload": "null"}
    hints = {"when": "2h, a moment, or nothing: as declared", "reason": WHY, "key": "idempotency key"}
    made, stands = [], hidden(shown=stamp_of(workflow))
    for calls, names in FORMS.items():
        allowed = [call for call in calls if workflow.state in CALLS[call]]
        buttons = [tag("button", in_text(call), formaction=url(f"/workflows/{workflow.id}/{call}")) for call in allowed]
        fields = [field(name, values.get(name, ""), hints.get(name, ""), choices.get(name)) for name in names]
        fields += [field("children", "", "", ["", "too"])] * ("cancel" in allowed and bool(children))
        if allowed and choices.get(names[0]) != []:
            made.append(post(*stands, *fields, tag("div", *buttons, class_="row")))
    return tag("div", *made, class_="forms") if made else ""


# ==== The calls =======================================================================================================


def call_one(number, call):
    given = request.given
    act(number, None if call in WHATEVER_STEP else given.get("shown", ""), call_of(call, given))
    return HTTPResponse(status=303, headers={**HEADERS, "Location": url(f"/workflows/{number}")})


def preview():
    """What a call on a group would be made of: it is made of these alone, and as they stand here."""
    call = request.query.getunicode("call", "")
    kind, step, error = (request.query.getunicode(name, "") for name in ("type", "step", "error"))
    if call not in GROUP_CALLS or request.read_only:
        raise HTTPError(400, "There is no such call on a group.")
    found = list(paused_group(kind, step, error))
    title = f"{call} {len(found):,} {kind} at {step}: {error or 'no error'}"
    stamps = " ".join(f"{number}/{stamp('paused', *stands)}" for number, *stands in found)
    some = list(newest(Workflow.select(*LISTED).where(Workflow.id.in_([number for number, *_ in found[:PER_PAGE]]))))
    button = tag("button", f"{call} these {len(found):,}", formaction=url("/group"))
    row = tag("div", button, tag("a", "leave them", href=url("/")), class_="row")
    form = post(*hidden(call=call, shown=stamps), field("reason", "", WHY), row) if found else ""
    caption = f"The newest {PER_PAGE} of them" if len(found) > PER_PAGE else ""
    return page(title, form, workflows_table(caption, some))


def call_group():
    given, done, left = request.given, 0, []
    make = call_of(given.get("call"), given)
    for each in given.get("shown", "").split():
        number, _, as_shown = each.partition("/")
        try:
            act(whole(number), as_shown, make)
            done += 1
        except HTTPError as refusal:  # it must not keep the others from their turn
            left.append([number, refusal.body])
    title = f"{given.get('call')}: {done:,} done, {len(left):,} left as they are"
    return page(title, *([table("Left as they are", ["workflow", "why"], left[:PER_PAGE])] if left else ()))


def call_of(call, given):
    """The call that a form asks for, as a function of the workflow."""
    reason = given.get("reason", "").strip() or None
    if call == "signal":
        try:
            payload = json.loads(given.get("payload") or "null")
        except ValueError as problem:
            raise HTTPError(400, f"The payload is not JSON: {problem}") from None
        return lambda workflow: workflow.signal(given.get("signal", ""), payload, given.get("key") or None)
    if call == "reschedule":
        when = time_of(given.get("when", "").strip())
        return lambda workflow: workflow.reschedule(when)
    if call == "resume_at":
        return lambda workflow: workflow.resume_at(given.get("step", ""), reason=reason)
    if call not in CALLS:
        raise HTTPError(404, "There is no such call.")
    if call == "cancel" and given.get("children"):
        return lambda workflow: workflow.cancel(reason=reason, children=True)
    return lambda workflow: getattr(workflow, call)(reason=reason)


def act(number, as_shown, make):
    """Make a call of a workflow; unless that is None, where it stands as it was shown, under its row's lock."""
    try:
        workflow = Workflow.get_or_none(Workflow.id == number) or missing(number)
        if as_shown is None:
            return make(workflow)
        with request.drive.database.atomic():
            # An update locks on every database and, as the first statement, before anything is seen; parents go first.
            for locked in filter(None, (workflow.parent_id, number)):
                Workflow.update(state=Workflow.state).where(Workflow.id == locked).execute()
            workflow = Workflow.get_or_none(Workflow.id == number) or missing(number)
            if as_shown != stamp_of(workflow):
                raise HTTPError(409, f"{workflow.type} {number} is not as it was shown: look again.")
            return make(workflow)
    except (GenevaDriveError, PeeweeException, DoesNotExist, TypeError, ValueError) as refusal:
        raise HTTPError(409, str(refusal)) from refusal


def stamp(state, execution_count, transitioned_at):
    """What tells whether a workflow stands as it was shown."""
    return f"{state},{execution_count},{transitioned_at and transitioned_at.isoformat()}"


def stamp_of(workflow):
    return stamp(workflow.state, workflow.execution_count, workflow.transitioned_at)


# ==== What is read ====================================================================================================


def newest(query):
    return query.order_by(Workflow.id.desc())


def counted(kind, state, query):
    """How many of the newest ones that a query finds are of which class and in which state."""
    found = query.select(kind.alias("type"), state.alias("state")).limit(COUNTED).alias("newest")
    return list(grouped(found, "type", "state", fn.COUNT(SQL("*"))))


def paused_groups():
    found = newest_paused()
    since = fn.MIN(found.c.transitioned_at).python_value(Workflow.transitioned_at.python_value)
    return list(grouped(found, "type", "current_step_name", "error_class_name", fn.COUNT(SQL("*")), since))


def grouped(found, *columns):
    return read(found, *columns).group_by(*(found.c[each] for each in columns if isinstance(each, str)))


def paused_group(kind, step, error):
    """The ids of a group, the newest first, with what their stamps are made of."""
    found = newest_paused()
    has_error = found.c.error_class_name == error if error else found.c.error_class_name.is_null()
    query = read(found, "id", "execution_count", "transitioned_at").order_by(found.c.id.desc())
    return query.where(found.c.type == kind, found.c.current_step_name == step, has_error)


def newest_paused():
    """The newest paused ones with their last errors: looked up one by one, lest all executions be read for them."""
    last_error = StepExecution.select(StepExecution.error_class_name).where(last_of(StepExecution))
    columns = (Workflow.id, Workflow.type, Workflow.current_step_name, Workflow.execution_count)
    query = Workflow.select(*columns, Workflow.transitioned_at, last_error.alias("error_class_name"))
    return newest(query.where(Workflow.state == SQL("'paused'"))).limit(NEWEST).alias("newest")


def read(found, *columns):
    """Tuples of a subquery's columns, and of what is made of them."""
    fields = {**StepExecution._meta.fields, **Workflow._meta.fields}
    named = [found.c[each].converter(fields[each].python_value) if isinstance(each, str) else each for each in columns]
    return Workflow.select(*named).from_(found).tuples()


def of_hero(hero_type, _, hero_id):
    return (Workflow.hero_type == hero_type) & (Workflow.hero_id == hero_id)


def stands_since(moment, last):
    since = fn.COALESCE(Workflow.transitioned_at, last.started_at, last.waits_since, last.created_at)
    # What is younger is told without its executions.
    return (Workflow.created_at <= moment) & (since <= Workflow.created_at.db_value(moment))


def last_error_has(found):
    """Looked up one by one, too: PostgreSQL would read all executions before it shows the first page of a group."""
    last = StepExecution.alias()
    has = fn.LOWER(last.error_class_name).contains(found.lower()) | last.error_message.contains(found)
    return last.select(Case(None, [(has, 1)])).where(last_of(last)) == 1


def last_of(executions):
    return (executions.workflow == Workflow.id) & (executions.number == Workflow.execution_count)


def selected(given):
    """A query for the workflows that are asked for, and the key that its pages go along."""
    query, key, known, last = Workflow.select(*LISTED), Workflow.id, classes(), StepExecution.alias()
    under = {kind for kind, cls in known.items() if issubclass(cls, known.get(given.get("type"), ()))}
    conditions = {
        "state": lambda state: Workflow.state == SQL(f"'{state}'" if state in STATES else "''"),
        "type": lambda kind: Workflow.type.in_(sorted(under | {kind})),
        "hero": lambda hero: of_hero(*hero.partition(":")),
        "step": lambda step: Workflow.current_step_name == step,
        "error": last_error_has,
        "why": Workflow.reason.contains,
        "waiting_for": lambda name: (StepExecution.state == "waiting") & (StepExecution.waiting_for == name),
        "older_than": lambda age: stands_since(request.now - duration(age), last),
        "parent": lambda number: Workflow.parent == whole(number),
    }
    if given.get("state") in ("ready", "performing") or "waiting_for" in given:  # an index of what is active has them
        query, key = query.join(StepExecution, on=(Workflow.id == OF) & ACTIVE), OF
    if "older_than" in given:
        query = query.switch(Workflow).join(last, on=last_of(last))
    for name in given.keys() & conditions.keys():
        query = query.where(conditions[name](given[name]))
    return query, key


def reasons(workflows):
    """Why each of them stands where it does: the reason of what stands still; of others, what their step waits for."""
    names = ("workflow", "state", "scheduled_for", "started_at", "waiting_for", "times_out_at")
    query = StepExecution.select(*(getattr(StepExecution, name) for name in names))
    active = {each.workflow_id: each for each in query.where(OF.in_([each.id for each in workflows]), ACTIVE)}
    return {each.id: reason(each, active.get(each.id)) for each in workflows}


def reason(workflow, active):
    if workflow.state == "paused":
        return workflow.reason or "by a call, without a reason: it waits for a person"
    if active is None or workflow.state in ("finished", "canceled"):
        return workflow.reason or ""
    if active.state == "in_progress":
        return f"performing for {span(request.now - active.started_at)}"
    if active.state == "waiting":
        what = f"for the signal {active.waiting_for}" if active.waiting_for else "for its children"
        return f"waits {what}" + (f", until {active.times_out_at:{MOMENT}}" if active.times_out_at else "")
    until = active.scheduled_for - request.now
    return f"due in {span(until)}" if until > timedelta(0) else f"due for {span(-until)}"


def attempts_of(workflow):
    """The newest attempts, in their order; of messages no more than is shown."""
    names = ["id", "workflow", "number", "step_name", "state", "outcome", "created_at", "scheduled_for", "started_at"]
    names += ["finished_at", "error_class_name", "reason", "begun_reason"]
    columns = [getattr(StepExecution, name) for name in names] + [KIND.alias("kind")]
    columns += [fn.SUBSTR(StepExecution.error_message, 1, MAX_MESSAGE).alias("message")]
    query = StepExecution.select(*columns).where(StepExecution.workflow == workflow.id)
    query = query.where(StepExecution.number > workflow.execution_count - MAX_ATTEMPTS)
    return list(query.order_by(StepExecution.number)) or missing(workflow.id)  # housekeeping has just deleted it


def classes():
    known, found = {}, [Workflow]
    while found:
        found += found.pop().__subclasses__()
        known |= {each.workflow_type: each for each in found}
    return known


def duration(text):
    units = {"d": 86400, "h": 3600, "min": 60, "s": 1, "ms": 0.001}
    if not re.fullmatch(r"(\s*\d{1,6}\s*(d|h|min|s|ms))+\s*", text):
        raise HTTPError(400, f"{text!r} is no duration such as 2d, 90min or 1h30min.")
    seconds = sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)\s*([a-z]+)", text))
    if seconds > 36500 * units["d"]:
        raise HTTPError(400, f"{text!r} is over a hundred years.")
    return timedelta(seconds=seconds)


def time_of(text):
    """A duration, a moment in UTC unless it says otherwise, or None for no text."""
    with suppress(ValueError):
        moment = datetime.fromisoformat(text.removesuffix("Z"))
        return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return duration(text) if text else None


def whole(text):
    if not re.fullmatch("[0-9]{1,18}", text):
        raise HTTPError(400, f"{text!r} is no number.")
    return int(text)


def missing(number):
    raise HTTPError(404, f"There is no workflow {number}, or it was deleted meanwhile.")


# ==== What is drawn ===================================================================================================


def page(title, *parts, status=200, refresh=None):
    links = [tag("a", "Overview", href=url("/")), tag("a", "Workflows", href=url("/workflows"))]
    links += [tag("span", f"as of {request.now:{MOMENT}} UTC", class_="note")] if hasattr(request, "now") else []
    main = tag("main", tag("nav", *links), tag("h1", title), *parts)
    headers = {**HEADERS, "Refresh": str(refresh)} if refresh else HEADERS
    response = HTTPResponse(TEMPLATE.format(title=text(title), style=STYLE, body=main), status, headers)
    if hasattr(request, "session"):
        secure, path = request.urlparts.scheme == "https", request.script_name
        response.set_cookie(COOKIE, request.session, path=path, httponly=True, samesite="strict", secure=secure)
    return response


def url(path, **query):
    given = {name: value for name, value in query.items() if value}
    return request.script_name.rstrip("/") + path + "?" * bool(given) + urlencode(given)


def hidden(**values):
    return [tag("input", type="hidden", name=name, value=value) for name, value in values.items()]


def field(name, value, hint="", options=None):
    """An input, or a choice where there are options."""
    if options is None:
        control = tag("input", name=name, value=value, placeholder=hint, autocomplete="off")
    else:
        chosen = [{"selected": ""} if each == value else {} for each in options]
        control = tag("select", *(tag("option", each, **is_it) for each, is_it in zip(options, chosen)), name=name)
    return tag("label", tag("span", name.replace("_", " ")), control)


def post(*fields):
    """A form for calls. The Enter key presses its first button, which does nothing: a call is to be chosen."""
    own = [tag("button", disabled="", hidden=""), *hidden(token=request.token)]
    return tag("form", *own, *fields, method="post", class_="card fields")


def workflows_table(caption, workflows):
    why, rows = reasons(workflows), []
    for each in workflows:
        link = tag("a", f"{each.type} {each.id}", href=url(f"/workflows/{each.id}"))
        hero = cut(f"{each.hero_type} {each.hero_id}", MAX_CELL) if each.hero_type else ""
        since = moment(each.transitioned_at or each.created_at)
        rows.append([link, badge(each.state), each.current_step_name or "", hero, cut(why[each.id], MAX_CELL), since])
    return table(caption, ["workflow", "state", "step", "hero", "why", "since, or created"], rows)


def in_words(attempt):
    outcome = f", {attempt.outcome}" if attempt.outcome not in (None, "success", attempt.state) else ""
    yield from (tag("bdi", attempt.step_name), f": {attempt.state}{outcome}")
    if attempt.started_at:
        yield from ("; began ", moment(attempt.started_at))
        yield f", took {span(attempt.finished_at - attempt.started_at)}" if attempt.finished_at else ""
    elif not attempt.finished_at:
        yield from ("; due ", moment(attempt.scheduled_for))
    for said in (attempt.begun_reason and f"resumed: {attempt.begun_reason}", attempt.reason):
        yield tag("p", cut(said), class_="note", dir="auto") if said and not attempt.error_class_name else ""
    yield error(attempt)


def error(attempt):
    if not attempt.error_class_name:
        return ""
    more = "…" * (len(attempt.message) == MAX_MESSAGE)
    return tag("p", f"{attempt.error_class_name}: {attempt.message}{more}", class_="error", dir="auto")


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
    lanes, whole_span = defaultdict(list), max(last - first, timedelta(milliseconds=1))
    for name, kind, said, begin, end in sorted(spans, key=lambda each: "thin" not in each[1]):  # attempts lie on top
        width = max(0.8, 100 * (end - begin) / whole_span)
        left = min(100 * (begin - first) / whole_span, 100 - width)
        title = tag("title", f"{said}, {span(end - begin)} from {begin:{MOMENT}}")
        lanes[name].append(tag("rect", title, x=f"{left:.2f}%", width=f"{width:.2f}%", class_=kind))
    steps = dict.fromkeys(each.step_name for each in attempts) | dict.fromkeys(lanes)
    rows = [(tag("bdi", name), tag("svg", *lanes[name], role="img", aria_label=name)) for name in steps]
    ends = tag("div", moment(first), tag("span", span(last - first)), moment(last), class_="ends")
    return tag("div", *(tag("div", *row, class_="lane") for row in [*rows, ("", ends)]))


def legend(kinds):
    return tag("p", *(tag("span", tag("b", said), class_=f"key {kind}") for kind, said in kinds.items()))


def badge(state):
    return tag("span", state, class_=f"badge {state}")


def moment(at):
    return tag("time", f"{at:{MOMENT}}", datetime=at.isoformat()) if at else "not yet"


def span(duration):
    seconds = max(duration.total_seconds(), 0)  # the clocks of two computers differ
    for unit, length in {"days": 86400, "h": 3600, "min": 60}.items():
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def in_cell(value):
    if value is None or isinstance(value, datetime):
        return moment(value)
    return cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), MAX_CELL)


def cut(words, limit=MAX_MESSAGE):
    return words if len(words) <= limit else words[:limit] + "…"


def in_text(call):
    return call.replace("_", " ")


def folded(summary, content):
    return tag("details", tag("summary", summary), content)


def table(caption, heads, rows):
    head = tag("tr", *(tag("th", each, scope="col") for each in heads))
    body = [tag("tr", *(tag("td", tag("bdi", cell), data_head=name) for name, cell in zip(heads, row))) for row in rows]
    made = tag("table", tag("thead", head), tag("tbody", *body)) if rows else tag("p", "None.", class_="note")
    return card(caption, made)


def card(caption, *content):
    return tag("section", tag("h2", caption) if caption else "", *content, class_="card")


# ==== HTML ============================================================================================================

# What is not seen, or rearranges what is: control characters, overrides of the direction, halves of pairs.
UNSEEN = "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"


class Html(str):
    """Markup; all else that is put into a tag is escaped."""


def text(value):
    return html.escape(re.sub(UNSEEN, lambda found: found[0].encode("unicode_escape").decode(), str(value)))


def tag(kind, /, *content, **attributes):
    inside = "".join(each if isinstance(each, Html) else text(each) for each in content)
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{text(each)}"' for key, each in attributes.items())
    return Html(f"<{kind}{written}>" if kind == "input" else f"<{kind}{written}>{inside}</{kind}>")


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
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
main { max-width: 76rem; margin: auto; padding: 0.8rem clamp(0.7rem, 3vw, 2rem) 4rem; overflow-wrap: anywhere }
nav, .row, .forms { display: flex; flex-wrap: wrap; gap: 0.5rem 0.8rem; align-items: baseline }
.fields { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 0.5rem 0.8rem }
.fields .row { align-self: end }
form[method=post] { display: flex; flex-wrap: wrap; align-content: start }
form[method=post] label { flex: 1 1 9rem; max-width: 40rem } form[method=post] .row { flex: 1 0 100% }
nav .note { margin-left: auto }
h1 { font-size: 1.4rem; margin: 0.8rem 0 } h2 { font-size: 1rem; margin: 0 0 0.5rem } p { margin: 0 0 0.5rem }
a { color: var(--going); text-decoration: none } a:hover { text-decoration: underline }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0.8rem 1rem }
.card { margin-bottom: 0.8rem; min-width: 0 }
.forms { align-items: stretch; margin-bottom: 0.8rem } .forms form { flex: 1 1 22rem; margin: 0 }
.note, thead th, .ends, summary, label span { color: var(--note); font-size: 0.85rem; font-weight: normal }
time { white-space: nowrap } label { min-width: 0 } label span { display: block }
.badge { border: 1px solid; border-radius: 1em; padding: 0 0.6em; font-size: 0.85rem; white-space: nowrap }
input, select, button { font: inherit; color: inherit; background: var(--page); border: 1px solid var(--line);
  border-radius: 6px; padding: 0 0.6rem; height: 2.1rem }
input, select { width: 100% } ::placeholder { color: var(--note) }
button { cursor: pointer; white-space: nowrap } button:hover { border-color: var(--going); color: var(--going) }

table { width: 100%; border-spacing: 0; font-variant-numeric: tabular-nums }
th, td { padding: 0.35rem 0.7rem 0.35rem 0; vertical-align: baseline; text-align: left }
td { border-top: 1px solid var(--line); min-width: 8.3rem }

.lane { display: grid; grid-template-columns: 13rem 1fr; gap: 0 1rem; align-items: center; min-height: 1.7rem }
.lane svg { width: 100%; height: 18px }
.ends { display: flex; justify-content: space-between; gap: 0.5rem; grid-column: 2 }
rect { fill: currentcolor; height: 12px; y: 3px } .lane .failed { height: 18px; y: 0 }
.lane .thin { height: 4px; y: 7px }
.done, .finished { color: var(--done) } .failed, .error { color: var(--failed) } .paused { color: var(--paused) }
.other, .canceled { color: var(--other) } .ready, .performing { color: var(--going) } .wait { color: var(--wait) }
.key { margin-right: 0.8rem; font-size: 0.85rem; display: inline-block }
.key b { font-weight: normal; color: var(--note) }
.key::before { content: ""; display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.4em;
  background: currentcolor }
.key.thin::before { height: 0.25em; vertical-align: 0.25em }
ol { padding-left: 2.2rem; margin: 0.3rem 0; font-size: 0.9rem } li p { margin: 0 } summary { cursor: pointer }
pre { margin: 0; max-height: 24rem; overflow: auto; white-space: pre-wrap; font-size: 0.8rem }

@media (max-width: 45rem) {
  h1 { font-size: 1.15rem }
  thead { display: none } tr { display: block; border-top: 1px solid var(--line); padding: 0.4rem 0 }
  td { display: flex; border: 0; padding: 0.05rem 0; gap: 0.4rem; overflow-wrap: anywhere }
  td::before { content: attr(data-head); flex: 0 0 4.9rem; color: var(--note); font-size: 0.85rem }
  .lane { grid-template-columns: 1fr } .lane .ends { grid-column: 1; font-size: 0.75rem }
}
"""

# Neither scripts nor anything from elsewhere, in no frame; of styles, this one.
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; form-action 'self'"
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": f"{POLICY}; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

if __name__ == "__main__":
    main()
