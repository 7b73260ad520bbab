"""Checks that the server can listen at its address, before a model is loaded."""

import socket


class AddressTaken(Exception):
    """The address is in use, or invalid."""


def check_address(host: str, port: int) -> None:
    """Raises AddressTaken unless all addresses of the host are free, as event loops demand. Address families that this
    machine does not support do not count.
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
