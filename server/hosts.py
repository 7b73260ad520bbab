"""Names that requests ask for, and whose they are."""

import ipaddress

ANY = "*"


def host_of(header: str) -> str:
    """The name in a Host header, in lower case, without the port."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].removesuffix(".")


def is_this_machine(host: str) -> bool:
    """Whether every computer takes that name for itself."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return False
