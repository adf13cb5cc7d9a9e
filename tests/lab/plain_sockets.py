"""Ping-pong over one plain TCP connection, without torch: `serve PORT` echoes, `ask ADDRESS PORT BYTES REPEATS` prints JSON."""

from __future__ import annotations

import json
import socket
import statistics
import sys
import time


def take(connection: socket.socket, nbytes: int) -> bytes:
    """Exactly so many bytes; fewer at the end of the connection."""
    parts, left = [], nbytes
    while left and (part := connection.recv(min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def serve(port: int) -> None:
    """Send back each message, of a size that its first 8 bytes tell, until the connection ends."""
    with socket.create_server(("0.0.0.0", port)) as server:
        print("listening", flush=True)
        connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        while head := take(connection, 8):
            connection.sendall(head + take(connection, int.from_bytes(head, "big") - 8))


def ask(address: str, port: int, nbytes: int, repeats: int) -> dict[str, float]:
    """Half of the median and of the shortest time until the message is back."""
    message, seconds = nbytes.to_bytes(8, "big") + bytes(nbytes - 8), []
    with socket.create_connection((address, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(repeats + 1):
            start_s = time.perf_counter()
            connection.sendall(message)
            take(connection, nbytes)
            seconds.append(time.perf_counter() - start_s)
    return {"median_s": statistics.median(seconds[1:]) / 2, "least_s": min(seconds[1:]) / 2}


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        print(json.dumps(ask(sys.argv[2], *map(int, sys.argv[3:]))), flush=True)
