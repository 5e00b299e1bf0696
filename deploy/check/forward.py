"""`kubectl port-forward`, as far as a client sees it: a port of localhost that leads to a pod."""

import contextlib
import socket
import threading


@contextlib.contextmanager
def forwarded(address, port):
    """The local port; closed at the end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener, (address, port)), daemon=True).start()
        yield listener.getsockname()[1]


def accept(listener, to):
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        pod = socket.create_connection(to)
        for source, sink in ((client, pod), (pod, client)):
            threading.Thread(target=copy, args=(source, sink), daemon=True).start()


def copy(source, sink):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
