"""Python processes that tests start have one driver for each server, as a user's have.

Peewee and Huey import whatever of them is installed; those that only tests need take most of the time of a start.
"""

import sys

sys.modules.update(dict.fromkeys(("apsw", "cysqlite", "mysql", "psycopg", "redis")))  # None: cannot be imported
