"""The store by which the processes of a job find each other, on one address alone.

It asks nobody who they are, and torch's own listens on all addresses of the machine: whoever
reaches it can write into it. What is read from it here is JSON, and addresses by gloo and NCCL.
"""

import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch's own oversight


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens on one of this machine's addresses; port 0 is any free one.

    Raises OSError where ``address`` is none of them, or the port is in use.
    """
    family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def serve(listener: socket.socket, timeout: timedelta) -> TCPStore:
    """The store, on a socket that it takes over. It lasts as long as this object."""
    address, port = listener.getsockname()[:2]
    return TCPStore(
        address,
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def connect(address: str, port: int, timeout: timedelta) -> TCPStore:
    """The store that another process serves; RuntimeError where nobody answers in time."""
    return TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
