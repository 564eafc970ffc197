"""A proxy in front of an HTTP server whose faults a test switches on and off."""

import contextlib
import socket
import threading
import time
from typing import Literal

Mode = Literal["ok", "503", "slow", "hang"]
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
SLOW_S = 0.3  # before each piece of data, in the mode "slow"


class FaultyProxy:
    """Forwards connections to a server. `mode` may be changed at any time, also for open connections.

    Modes: "ok" forwards, "503" answers every request with that status, "slow" delays each piece of data, "hang" takes
    requests and never answers. With `fails_at`, "503" begins when a file of that name is written.
    """

    def __init__(self, server: str, own_host: str = "127.0.0.1", own_port: int = 0) -> None:
        host, _, port = server.removeprefix("http://").rpartition(":")
        self.server, self.mode = (host, int(port)), "ok"
        self.refused = 0  # requests that got a 503
        self.fails_at: str | None = None
        self.written: list[str] = []  # paths of the files that were written, perhaps in several parts
        self._listener = socket.create_server((own_host, own_port))
        self.address = f"http://{own_host}:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def set(self, mode: Mode) -> None:
        """Change the mode."""
        self.mode = mode

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self.server) as server:
            threading.Thread(target=self._copy_answers, args=(server, client), daemon=True).start()
            while data := client.recv(1 << 16):
                self._note(data)
                if self.mode == "503":
                    self.refused += 1
                    client.sendall(UNAVAILABLE)
                    return
                while self.mode == "hang":
                    time.sleep(0.05)
                self._delay()
                server.sendall(data)

    def _note(self, data: bytes) -> None:
        """Note what a request writes. Part of a body cannot begin like one, as long as tests write other files."""
        if data.startswith(b"PUT /"):
            path = data.split()[1].decode().partition("?")[0]
            if self.fails_at and path.endswith(f"/{self.fails_at}"):
                self.mode = "503"
            elif self.mode != "503":
                self.written.append(path)

    def _copy_answers(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                self._delay()
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)

    def _delay(self) -> None:
        if self.mode == "slow":
            time.sleep(SLOW_S)
