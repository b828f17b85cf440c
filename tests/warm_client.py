"""The process that a test sees of one forked by tests/warm.py; imports next to nothing, to start in 0.02 s."""

import json
import os
import signal
import socket
import sys

connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
asked = {"command": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd()}
body = json.dumps(asked).encode()
socket.send_fds(connection, [len(body).to_bytes(8)], [0, 1, 2])
connection.sendall(body)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: connection.send(bytes([number])))
for stream in range(3):  # they are the other's now
    os.close(stream)
status = int(connection.recv(16) or -signal.SIGKILL)
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
