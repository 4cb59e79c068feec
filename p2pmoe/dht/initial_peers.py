"""The peers that a node was told of: their names become addresses, our own is left out, and why one does not answer is
found out. Runs on the DHT's loop; knows no table and no records.

Each peer that does not answer has its own reason, because each has its own remedy:

1. its name does not resolve
2. it has addresses of a version of IP that our socket does not take
3. our socket listens on this machine alone, and the peer is elsewhere
4. there is no way to its address
5. nobody listens at its port (the system there says so)
6. a node of another swarm, or of another version, is there, and has said something to us
7. whoever is there says nothing: a private swarm, another swarm, a firewall
"""

from __future__ import annotations

import asyncio
import enum
import errno
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from p2pmoe.config import parse_host_port
from p2pmoe.dht.addresses import is_own_host, is_wildcard
from p2pmoe.dht.datagram_socket import address_on
from p2pmoe.errors import ConfigError, NameLookupError
from p2pmoe.protocol.datagrams import DATAGRAM_VERSION, Address, is_sendable, pack_address, scope_of
from p2pmoe.rpc.resolver import Resolver
from p2pmoe.types import canonical_host, parse_ip

LOOKUP_TIMEOUT_S: Final = 2.0
PROBE_TIMEOUT_S: Final = 0.3
MAX_PROBES: Final = 16
MAX_OWN: Final = 256


class Silence(enum.Enum):
    """What the system says of an address that does not answer us."""

    LOOPBACK = "loopback"
    NO_WAY = "no way"
    REFUSED = "refused"
    NOTHING = "nothing"


class InitialPeers:
    """The `HOST:PORT` texts of `dht.initial_peers`.

    Args:
        peers: the texts.
        swarm_id: for what is said.
        announced: host and port that others know us by, where that is not what our socket is bound to.
        resolver: looks names up.

    Raises:
        ConfigError: a text is no HOST:PORT, or its address is no single machine's.
    """

    def __init__(
        self,
        peers: Sequence[str],
        *,
        swarm_id: str,
        announced: tuple[str | None, int | None] = (None, None),
        resolver: Resolver | None = None,
    ) -> None:
        self._peers = {peer: _parse(peer) for peer in peers}
        self._swarm_id = swarm_id
        self._announced = announced
        self._resolver = resolver or Resolver()
        self._versions = frozenset({4})
        self._bound: Address = ("127.0.0.1", 0)
        self._own: set[Address] = set()
        self._seen: set[Address] = set()
        self._addresses: dict[str, list[Address]] = {}
        self._troubles: dict[str, str] = {}
        self.any_silent = False
        """Whether somebody may be there who says nothing, as `why_silent` found it."""
        self.elsewhere: dict[Address, str] = {}
        """What was said by those who answer, but not as a peer of ours."""

    def bind(self, bound: Address, versions: frozenset[int]) -> None:
        """Our socket: where it is bound, which versions of IP it takes."""
        self._bound, self._versions = bound, versions
        for peer, (host, _) in self._peers.items():
            if host == "localhost":  # RFC 6761, whatever the hosts file says
                self._note(peer, ["127.0.0.1", "::1"])
            elif not self._is_name(host):
                self._note(peer, [host])

    # --- who they are -----------------------------------------------------------------------------------------

    @property
    def texts(self) -> tuple[str, ...]:
        """As they were given."""
        return tuple(self._peers)

    @property
    def names(self) -> list[str]:
        """Those that have to be looked up."""
        return [peer for peer, (host, _) in self._peers.items() if self._is_name(host)]

    @property
    def others(self) -> list[str]:
        """Those that are not ourselves, as far as that is known."""
        return [peer for peer in self._peers if not self.is_us(peer)]

    @property
    def names_us(self) -> bool:
        """Whether we are among them: others will look for us here."""
        return len(self.others) < len(self._peers)

    def is_us(self, peer: str) -> bool:
        """Whether this peer is what we are announced as, or every address of it that we could ask is our own."""
        if self._peers[peer] == self._announced_name():
            return True
        found = self._addresses.get(peer, [])
        own = [address for address in found if self.is_own(address)]
        return bool(own) and not any(self._reaches(address) for address in found if address not in own)

    def is_own(self, address: Address) -> bool:
        """Whether datagrams to this address come to our own socket, as far as that is known."""
        return address in self._own

    def may_be_us(self, address: Address) -> bool:
        """Whether this may be ourselves: by what is known, by what the system says, or by what some peer says."""
        return address in self._own or address in self._seen or self._leads_to_us(address)

    def note_own(self, address: Address) -> None:
        """A datagram that we sent there came back to us."""
        if len(self._own) < MAX_OWN:
            self._own.add(address)

    def note_seen(self, address: Address) -> None:
        """A peer says that ours come from there. It may lie: nobody is left out for that."""
        if len(self._seen) < MAX_OWN:
            self._seen.add(address)

    def note_foreign(self, address: Address, head: bytes) -> None:
        """A datagram of another swarm or version came from there."""
        for peer in (peer for peer, addresses in self._addresses.items() if address in addresses):
            if head[:1] != bytes([DATAGRAM_VERSION]):
                self.elsewhere[address] = (
                    f"whoever is at {peer} speaks version {head[0] if head else 0} of the DHT's datagrams, we speak "
                    f"{DATAGRAM_VERSION}: install the same version of p2pmoe on both"
                )
            else:
                self.elsewhere[address] = (
                    f"at {peer} is a node of another swarm (ours is {self._swarm_id!r}): pass its name with --swarm-id"
                )

    def known(self) -> list[Address]:
        """The addresses of all peers as they were found last, without our own."""
        found = (address for addresses in self._addresses.values() for address in addresses)
        return [address for address in dict.fromkeys(found) if not self.is_own(address) and self._reaches(address)]

    @property
    def is_hopeless(self) -> bool:
        """Whether no datagram of ours can reach any of the others, however long we try."""
        return not self.names and all(
            not self._reaches(address) or self._is_cut_off(address)
            for peer in self.others
            for address in self._addresses.get(peer, [])
        )

    async def look_up(self, peer: str) -> list[Address]:
        """The addresses of one peer that may be asked; none when its name does not resolve in time."""
        host, _ = self._peers[peer]
        try:
            hosts = await self._resolver.addresses(host, timeout_s=LOOKUP_TIMEOUT_S)
        except NameLookupError as error:
            self._troubles[peer] = f"{error}: check its spelling and this machine's DNS, or give an IP address"
            return []
        await asyncio.to_thread(self._note, peer, hosts)  # looking at interfaces is a system call for each
        return [address for address in self._addresses[peer] if not self.is_own(address) and self._reaches(address)]

    def _note(self, peer: str, hosts: Iterable[str]) -> None:
        port = self._peers[peer][1]
        addresses = [(host, port) for host in dict.fromkeys(hosts) if is_sendable(pack_address(host, 1)[:-2])]
        self._own.update(address for address in addresses if self.is_us(peer) or self._leads_to_us(address))
        self._addresses[peer] = addresses
        self._troubles.pop(peer, None)

    @staticmethod
    def _is_name(host: str) -> bool:
        """Whether it has to be looked up: the name of an interface has, too."""
        return host != "localhost" and (parse_ip(host) is None or "%" in host)

    def _leads_to_us(self, address: Address) -> bool:
        if address == self._announced_name():
            return True
        host, port = address
        if port != self._bound[1]:
            return False
        if not is_wildcard(self._bound[0]):
            return host == self._bound[0]
        return _version(host) in self._versions and is_own_host(host)

    def _is_cut_off(self, address: Address) -> bool:
        """Whether our socket is bound to loopback, and the address is another machine's."""
        bound = self._bound[0]
        return scope_of(bound) == 0 and not is_wildcard(bound) and not is_own_host(address[0])

    def _announced_name(self) -> tuple[str, int] | None:
        host, port = self._announced
        return None if host is None else (canonical_host(host), port or self._bound[1])

    def _reaches(self, address: Address) -> bool:
        return _version(address[0]) in self._versions

    # --- why they are silent ----------------------------------------------------------------------------------

    async def why_silent(self, make_ping: Callable[[], bytes]) -> list[str]:
        """A reason for each peer that is not ourselves. `make_ping` makes a datagram that a peer would answer."""
        self.any_silent = False
        unreached = [address for address in self.known() if address not in self.elsewhere][:MAX_PROBES]
        silences = await asyncio.gather(*(self._probe(address, make_ping()) for address in unreached))
        found = dict(zip(unreached, silences, strict=True))
        return [self._why(peer, found) for peer in self.others]

    def _why(self, peer: str, silences: dict[Address, Silence]) -> str:
        if peer in self._troubles:
            return self._troubles[peer]
        addresses = [each for each in self._addresses.get(peer, []) if not self.is_own(each)]
        usable = [each for each in addresses if self._reaches(each)]
        if addresses and not usable:
            missing = _version(addresses[0][0])
            every = "::" if missing == 6 else "0.0.0.0"  # noqa: S104 - a remedy, not bound
            return (
                f"{peer} has IPv{missing} addresses only, and our DHT, which listens on {self._bound[0]}, has none: "
                f"pass --host {every}, or set dht.host"
            )
        for address in usable:
            if address in self.elsewhere:
                return self.elsewhere[address]
        seen = {silences.get(each, Silence.NOTHING) for each in usable}
        if Silence.NOTHING in seen or not seen:
            self.any_silent = True
            return (
                f"nobody answers us at {peer}, and nothing says that the port is closed: a firewall, or a node of "
                f"another swarm (ours is {self._swarm_id!r}, see --swarm-id)"
            )
        if Silence.REFUSED in seen:
            return (
                f"nobody listens at UDP port {self._peers[peer][1]} of {self._peers[peer][0]}: is the node running, "
                f"and is this the port of its DHT (--dht-port), not that of the calls?"
            )
        if Silence.LOOPBACK in seen:
            return (
                f"{peer} is on another machine, and our DHT listens on {self._bound[0]}, which is this machine alone: "
                f"pass --host 0.0.0.0, or set dht.host"
            )
        return f"there is no way from this machine to {peer}: check its network and the address"

    async def _probe(self, address: Address, ping: bytes) -> Silence:
        """Ask from a socket of its own, which is told when nobody listens there."""
        if self._is_cut_off(address):
            return Silence.LOOPBACK
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            try:
                sock.connect(address_on(sock, address))
                sock.send(ping)
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    await asyncio.get_running_loop().sock_recv(sock, 2048)
            except ConnectionError:
                return Silence.REFUSED
            except TimeoutError:
                return Silence.NOTHING
            except OSError as error:
                unreachable = error.errno in {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EINVAL}
                return Silence.NO_WAY if unreachable else Silence.NOTHING
        return Silence.NOTHING

    def __repr__(self) -> str:
        return f"<InitialPeers {len(self._peers)}, {len(self.others)} of them others>"


def _parse(peer: str) -> tuple[str, int]:
    host, port = parse_host_port(peer, what="initial peer")
    ip = parse_ip(host)
    if ip is not None and not is_sendable(ip.packed):
        raise ConfigError(
            f"initial peer {peer!r}: {host} is no address of one machine; give the one that the node is reached at"
        )
    return host, port


def _version(host: str) -> int:
    return 6 if ":" in host else 4
