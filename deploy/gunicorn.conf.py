"""The web side under gunicorn: gunicorn -c deploy/gunicorn.conf.py 'engine.app:create_app()'

Reads the same settings as `orbitstream serve`, which starts it too. Start `orbitstream write` beside it, on the same
lane directory, to have the lanes drained.
"""

import sys

import engine.app  # noqa: F401 - imported before the fork, a worker that replaces a dead one answers within 50 ms
from engine import lanes, logs, process, settings, tokens

try:
    _config = settings.load()
    lanes.prepare(_config.lane_dir, _config.durability)
    if _config.tokens_file is not None:
        tokens.load(_config.tokens_file)
except (settings.SettingError, lanes.LaneDirError) as error:
    print(f"orbitstream: {error}", file=sys.stderr)
    sys.exit(2)

_supervised = settings.supervised()

bind = [f"fd://{_supervised[1]}"] if _supervised else [f"{_config.host}:{_config.port}"]
proc_name = "orbitstream-web"
workers = _config.workers
worker_class = {"eventloop": "engine.http_worker.Worker", "gthread": "engine.gthread.Worker"}[_config.worker_class]
# gthread alone: a keep-alive connection waits in a poller, not in a thread. More threads only hand the GIL around.
threads = 4
http_parser = "python"  # gunicorn's own C parser, where it is installed, lets folded headers pass
worker_connections = 1000
# Longer than a client's pause between batches: a request on a connection closed just then has an unknown outcome.
keepalive = 75
timeout = 30
graceful_timeout = 20
backlog = 2048
# The heartbeat file of gunicorn's own workers, where no disk can stall it.
worker_tmp_dir = "/dev/shm"
control_socket_disable = True
preload_app = False  # a worker takes its lane after the fork
logconfig_dict = logs.for_gunicorn(_config.log_level)


def on_starting(server):
    # Only under a supervisor: a gunicorn started from a shell must outlive it.
    if _supervised:
        process.die_with_parent(_supervised[0])


def when_ready(server):
    # gunicorn may have been told to listen elsewhere: by -b, GUNICORN_CMD_ARGS, or a socket of systemd's.
    for listener in server.LISTENERS:
        address = listener.sock.getsockname()
        if isinstance(address, tuple):
            try:
                settings.check_exposure(_config, address[0])
            except settings.SettingError as error:
                print(f"orbitstream: {error}", file=sys.stderr)
                sys.exit(2)


def post_fork(server, worker):
    process.die_with_parent(server.pid)
