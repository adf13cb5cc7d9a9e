"""Plain TCP between hosts, measured where it arrives.

`sink PORT SECONDS` prints one JSON line for every 100 ms; `send ADDRESS PORT SECONDS` sends as fast as the link takes it.
"""

from __future__ import annotations

import json
import socket
import sys
import time

BIN_S = 0.1
CHUNK = 1 << 16


def sink(port: int, seconds: float) -> None:
    """Take bytes from one connection; Mbit/s of each 100 ms, also of those in which nothing came."""
    with socket.create_server(("0.0.0.0", port)) as server:
        print(json.dumps({"listening": port}), flush=True)
        connection, _ = server.accept()
    buffer = bytearray(CHUNK)
    start_s = bin_s = time.perf_counter()
    taken = 0
    with connection:
        while bin_s - start_s < seconds:
            connection.settimeout(max(1e-3, bin_s + BIN_S - time.perf_counter()))
            try:
                count = connection.recv_into(buffer)
                if not count:
                    return
                taken += count
            except TimeoutError:
                pass  # nothing has come: that is a result too
            now_s = time.perf_counter()
            if now_s - bin_s >= BIN_S:
                print(json.dumps({"mbit_per_s": 8e-6 * taken / (now_s - bin_s)}), flush=True)
                bin_s, taken = now_s, 0


def send(address: str, port: int, seconds: float) -> None:
    chunk = bytes(CHUNK)
    end_s = time.perf_counter() + seconds
    with socket.create_connection((address, port)) as connection:
        while time.perf_counter() < end_s:
            connection.sendall(chunk)


if __name__ == "__main__":
    if sys.argv[1] == "sink":
        sink(int(sys.argv[2]), float(sys.argv[3]))
    else:
        send(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
