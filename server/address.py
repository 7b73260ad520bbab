"""Whether a server can listen where it is asked to, before it loads a model."""

import errno
import socket


class AddressTaken(Exception):
    """Nobody can listen there."""


def check_address(host: str, port: int) -> None:
    """Raises AddressTaken. A name may have an address of a kind that this machine has not, beside another."""
    told = f"can't listen on {host}, port {port}"
    try:
        places = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise AddressTaken(f"{told}: {error}") from error
    missing: list[OSError] = []
    for family, kind, protocol, _, address in places:
        try:
            with socket.socket(family, kind, protocol) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind(address)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise AddressTaken(f"{told}: {error}") from error
            missing.append(error)
    if len(missing) == len(places):
        raise AddressTaken(f"{told}: {missing[0]}")
