#!/usr/bin/env bash
# A server of uvicorn on a socket that it is given, or that it makes itself for --reload or --workers, answers every
# request of a kept connection 40 ms late.
#
# Versions:  uvicorn 0.54.0 with h11 0.16.0 on asyncio's loop; Python 3.11; Linux.
# Expected:  one server, one speed: asyncio is documented to set TCP_NODELAY on TCP sockets.
# Behaviour: asyncio does so where sock.proto is IPPROTO_TCP. Sockets of socket.create_server() and of uvicorn's own
#            Config.bind_socket() have proto 0, and so have those that they accept: head and body of an answer are two
#            writes, the second of which waits until the client acknowledges the first, 40 ms later.
# Why it matters: `sockets=[...]` (a port chosen before a slow start, systemd, --reload, --workers) turns answers of
#            less than a millisecond into 40 ms. listener.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1) mends it.
# Output:
OUTPUT='host and port: at once
Config.bind_socket: over 30 ms
socket.create_server: over 30 ms
socket.create_server, TCP_NODELAY: at once'
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uvicorn==0.54.0 h11==0.16.0
cat > "$folder/waits.py" <<'EOP'
import http.client, socket, statistics, threading, time
import uvicorn


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def speed(listener):
    config = uvicorn.Config(app, port=0, loop="asyncio", http="h11", lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    sockets = [config.bind_socket() if listener == "own" else listener] if listener else None
    threading.Thread(target=server.run, args=(sockets,), daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    connection, times = http.client.HTTPConnection("127.0.0.1", port), []
    for _ in range(50):
        begin = time.perf_counter()
        connection.request("GET", "/")
        connection.getresponse().read()
        times.append(time.perf_counter() - begin)
    server.should_exit = True
    return "over 30 ms" if statistics.median(times) > 0.03 else "at once"


nodelay = socket.create_server(("127.0.0.1", 0))
nodelay.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for name, listener in (("host and port", None), ("Config.bind_socket", "own"), ("socket.create_server",
                       socket.create_server(("127.0.0.1", 0))), ("socket.create_server, TCP_NODELAY", nodelay)):
    print(f"{name}: {speed(listener)}", flush=True)
EOP
found=$("$folder/venv/bin/python" "$folder/waits.py")
echo "$found"
[ "$found" = "$OUTPUT" ] || { echo "uvicorn behaves otherwise now" >&2; exit 1; }
