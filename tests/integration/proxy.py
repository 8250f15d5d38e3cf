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
        self._open: list[tuple[socket.socket, socket.socket]] = []
        self._down = False
        self.num_cut = 0
        """Connections that were in use when they were cut."""
        self.num_refused = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, down: bool) -> None:
        """End all connections; ``down``: and every new one, until the next call."""
        self._down = down
        for pair in tuple(self._open):
            self.num_cut += 1
            for connection in pair:
                with contextlib.suppress(OSError):  # ended meanwhile
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut(down=True)
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listening.accept()[0]
                if self._down:
                    self.num_refused += 1
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._upstream))
                self._open.append((client, server))
                threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        answers = threading.Thread(target=self._pass, args=(server, client), daemon=True)
        answers.start()
        self._pass(client, server)
        answers.join()
        self._open.remove((client, server))
        client.close()
        server.close()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
