"""Host names in requests."""

import ipaddress
import re

ANY = "*"


def host_of(header: str) -> str:
    """The name in a Host header, in lower case, without the port; "" for an invalid header."""
    match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:]*?)\.?)(?::\d*)?", header.strip().lower())
    return (match[1] or match[2] or "") if match else ""


def is_this_machine(host: str) -> bool:
    """Whether the name means the machine itself: localhost, or a loopback address."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return False
