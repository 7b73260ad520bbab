"""Whether a server can listen where it is asked to, before it loads a model."""

import socket


class AddressTaken(Exception):
    """Nobody can listen there."""


def check_address(host: str, port: int) -> None:
    """Raises AddressTaken. As event loops have it: all addresses of a name must be free, but those of a kind that this
    machine knows nothing of.
    """
    try:
        places = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in places:
            try:
                listener = socket.socket(family, kind, protocol)
            except OSError:
                continue
            with listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise AddressTaken(f"can't listen on {host}, port {port}: {error}") from error
