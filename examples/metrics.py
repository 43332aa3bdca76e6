"""Metrics for Prometheus over HTTP: what drive.stats() counts, in the text format that Prometheus reads.

    python examples/metrics.py app:drive [--port 9464]    # `drive` in your app.py; its database is only read
    python examples/metrics.py                            # a demonstration, on a database that is made for it
    curl http://127.0.0.1:9464/metrics

Run one such process for a database, however many consumers there are: the numbers come from the tables. An alert or two
that are worth having: geneva_drive_paused_ratio > 0.1, geneva_drive_oldest_overdue_seconds > 300.
"""

import argparse
import itertools
import pkgutil
import sys
import tempfile
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

from peewee import SqliteDatabase

from geneva_drive import GenevaDrive, Workflow, step

ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def exposition() -> str:
    """All metrics as Prometheus' text format, version 0.0.4; those of one name follow each other in stats()."""
    lines = []
    for name, group in itertools.groupby(drive.stats(), key=lambda metric: metric.name):
        lines.append(f"# TYPE {name} gauge")
        for _, labels, value in group:
            inside = ",".join(f'{label}="{text.translate(ESCAPES)}"' for label, text in labels.items())
            lines.append(f"{name}{{{inside}}} {value}" if labels else f"{name} {value}")
    return "\n".join(lines) + "\n"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        with drive.database.connection_context():
            body = exposition().encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.end_headers()
        self.wfile.write(body)


def demonstration(folder):
    drive = GenevaDrive(SqliteDatabase(f"{folder}/demo.db", pragmas={"journal_mode": "wal"}, timeout=10))

    class Delivery(Workflow):
        may_proceed_without_hero = True

        @step
        def hand_over(self):
            if not self.context["address"]:
                self.pause()

    drive.create_tables()
    for address in ("1 Elm Street", "2 Oak Street", ""):
        Delivery.create(context={"address": address})
    drive.run(until=drive.is_idle)
    return drive


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve the metrics of an application to Prometheus.")
    parser.add_argument("app", nargs="?", help="module:attribute of the drive; without it, a demonstration")
    parser.add_argument("--port", type=int, default=9464)
    args, sys.path[:0] = parser.parse_args(), [""]
    with tempfile.TemporaryDirectory() as folder, suppress(KeyboardInterrupt):
        try:
            drive = pkgutil.resolve_name(args.app) if args.app else demonstration(folder)
        except (ImportError, AttributeError, ValueError) as error:
            parser.error(f"{args.app}: {error}")
        if not isinstance(drive, GenevaDrive):
            parser.error(f"{args.app} is no GenevaDrive, but {drive!r:.100}")
        server = HTTPServer(("127.0.0.1", args.port), Handler)
        print(f"http://127.0.0.1:{server.server_port}/metrics", flush=True)
        server.serve_forever()
