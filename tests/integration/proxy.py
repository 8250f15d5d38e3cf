"""A TCP proxy whose connections a test can cut."""

import contextlib
import socket
import threading


class Proxy:
    """Passes bytes between a port of its own and another one on loopback."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._open: list[socket.socket] = []
        self._down = False
        self.num_cut = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, down: bool) -> None:
        """End all connections; ``down``: and every new one, until the next call."""
        self._down = down
        while self._open:
            connection = self._open.pop()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
                self.num_cut += 1
            connection.close()

    def close(self) -> None:
        self.cut(down=True)
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listening.accept()[0]
                if self._down:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._upstream))
                self._open += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
