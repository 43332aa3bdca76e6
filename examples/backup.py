"""A script for cron that brings GenevaDrive along: a folder with three files, and nothing to install but two libraries.

    mkdir backup && cp geneva_drive.py geneva_drive_schema.sql examples/backup.py backup/
    pip install peewee huey
    python backup/backup.py notes.txt

Keeps compressed copies of a file (by default, of this script), one for each day, the newest seven. Start it as often as
you like: what was copied today is not copied again, and a copy that failed or was interrupted goes on where it stopped.
"""

import gzip
import sys
from datetime import date
from hashlib import sha256
from pathlib import Path

from peewee import CharField, Model, SqliteDatabase

import geneva_drive
from geneva_drive import GenevaDrive, Workflow, step

FILE = Path(sys.argv[1] if sys.argv[1:] else __file__).resolve()
COPIES = FILE.with_name(f"{FILE.name}.copies")
COPIES.mkdir(exist_ok=True)

db = SqliteDatabase(COPIES / "backup.db", pragmas={"journal_mode": "wal"}, timeout=10)
drive = GenevaDrive(db)


class Day(Model):
    date = CharField(primary_key=True)

    class Meta:
        database = db


class Backup(Workflow):
    @step
    def copy_file(self):
        content = FILE.read_bytes()
        (COPIES / f"{self.hero.date}.gz").write_bytes(gzip.compress(content))
        self.context["sha256"] = sha256(content).hexdigest()

    @step
    def check_copy(self):
        content = gzip.decompress((COPIES / f"{self.hero.date}.gz").read_bytes())
        if sha256(content).hexdigest() != self.context["sha256"]:
            raise ValueError(f"the copy of {self.hero.date} is damaged")

    @step
    def remove_old_copies(self):
        for copy in sorted(COPIES.glob("*.gz"))[:-7]:
            copy.unlink()


if __name__ == "__main__":
    drive.create_tables([Day])
    with db.atomic("IMMEDIATE"):
        today, is_new = Day.get_or_create(date=str(date.today()))
        if is_new:
            Backup.create(hero=today)
    for failed in Backup.paused():
        failed.resume()
    drive.run(until=drive.is_idle)
    print("run by", geneva_drive.__file__)
    for backup in Backup.select():
        print(f"the backup of {backup.hero_id} is {backup.state}")
    sys.exit(Backup.paused().exists())
