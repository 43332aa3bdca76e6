"""Metrics for Prometheus over HTTP: what drive.stats() counts, in the text format that Prometheus reads.

    python metrics.py 9464                      # and from then on
    curl http://127.0.0.1:9464/metrics

Run one such process for a database, however many consumers there are: the numbers come from the tables. An alert or two
that are worth having: geneva_drive_paused_ratio > 0.1, geneva_drive_oldest_overdue_seconds > 300.
"""

import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

from peewee import CharField, Model, SqliteDatabase

from geneva_drive import GenevaDrive, Workflow, step

db = SqliteDatabase("metrics.db", pragmas={"journal_mode": "wal"}, timeout=10)
drive = GenevaDrive(db)
HELP = {
    "geneva_drive_workflows": "Workflows in the tables, by class and state.",
    "geneva_drive_paused_ratio": "The part of the ongoing workflows that is paused.",
    "geneva_drive_recovered_steps": "Attempts that ended with their process, of the workflows in the tables.",
    "geneva_drive_overdue_steps": "Steps that are due and not begun.",
    "geneva_drive_oldest_overdue_seconds": "For how long the oldest of them has been due.",
}


class Parcel(Model):
    address = CharField()

    class Meta:
        database = db


class Delivery(Workflow):
    @step
    def hand_over(self):
        if not self.hero.address:
            raise ValueError("the parcel has no address")


def escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def exposition() -> str:
    """All metrics as Prometheus' text format, version 0.0.4; those of one name follow each other in stats()."""
    lines, last = [], None
    for name, labels, value in drive.stats():
        if name != last:
            lines += [f"# HELP {name} {HELP[name]}", f"# TYPE {name} gauge"]
            last = name
        inside = ",".join(f'{label}="{escaped(text)}"' for label, text in labels.items())
        lines.append(f"{name}{{{inside}}} {value}" if labels else f"{name} {value}")
    return "\n".join(lines) + "\n"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = exposition().encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    db.create_tables([Parcel])
    drive.create_tables()
    for address in ("1 Elm Street", "2 Oak Street", ""):
        Delivery.create(hero=Parcel.create(address=address))
    drive.run(until=drive.is_idle)
    server = HTTPServer(("127.0.0.1", int(sys.argv[1]) if sys.argv[1:] else 9464), Handler)
    print(f"http://127.0.0.1:{server.server_port}/metrics", flush=True)
    server.serve_forever()
