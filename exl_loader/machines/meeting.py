"""How machines find each other: through PyTorch's TCPStore at the first machine's address.

The first machine writes a call with a new session's number and waits for answers. Each other
machine looks for a call every half second, for ever, and answers one call once. When every rank
has answered, the first machine writes who sits where, or why it refuses, and takes the call back.
Then each machine makes the gloo groups to its two neighbours.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from ..utils.errors import MachineLost, MachineRefused, shown
from .address import MOST_MACHINES, Address, Seat
from .hello import Hello, check_hello, own_hello, read_hello
from .link import Group, daemon
from .ring import Machine

# How often a machine looks whether something was written.
LOOK_S = 0.25
# How long one look may take before the first machine counts as unreachable.
STORE_S = 10.0
# How long all neighbours have to connect to each other once everybody has answered.
LINK_S = 30.0
# How long a refusal waits for those who are to read it.
_READERS_S = 3.0
# The longest text that is read from the store.
MAX_NOTE_BYTES = 1 << 20

_PREFIX = "exl_loader/1"
_CALL = "call"

T = TypeVar("T")


class Unreachable(Exception):
    """The first machine cannot be reached; the text says why."""


def bounded(function: Callable[[], T], seconds: float) -> T:
    """Call a function that may wait for another machine, for a limited time.

    Past it the thread that waits is left alone: nothing can end it, and it holds nothing but its
    connection.

    Raises:
        Unreachable: it took longer, or failed.
    """
    results: list[Any] = []

    def call() -> None:
        try:
            results.append((True, function()))
        except Exception as error:
            results.append((False, error))

    thread = daemon(call, "meeting")
    thread.start()
    thread.join(seconds)
    if not results:
        raise Unreachable(f"it did not answer for {seconds:g} s")
    succeeded, value = results[0]
    if not succeeded:
        text = " ".join(str(value).split())
        closed = "Failed to recv" in text or "closed" in text
        raise Unreachable("the connection was closed" if closed else text[:300])
    return value


class Board:
    """Notes that all machines can read: JSON by name, in the TCPStore."""

    def __init__(self, store: TCPStore) -> None:
        self.store = PrefixStore(_PREFIX, store)

    def read(self, name: str) -> Any:
        """Return a note, or None where there is none."""
        text = bounded(
            lambda: self.store.get(name) if self.store.check([name]) else b"", STORE_S
        )
        if not text or len(text) > MAX_NOTE_BYTES:
            return None
        try:
            return json.loads(text)
        except ValueError:
            return None

    def write(self, name: str, value: Any) -> None:
        """Write a note."""
        text = json.dumps(value)
        bounded(lambda: self.store.set(name, text), STORE_S)

    def clear(self, name: str) -> None:
        """Empty a note. It is not removed: who has just seen it would wait for it to come back."""
        self.write(name, None)

    def number(self, name: str) -> int:
        """Count up a counter and return it: 1, 2, ..."""
        return bounded(lambda: self.store.add(name, 1), STORE_S)

    def counted(self, name: str) -> int:
        """Return a counter without changing it."""
        return bounded(lambda: self.store.add(name, 0), STORE_S)


def numeric_address(host: str, port: int) -> str:
    """Return the IP address of a host name.

    Raises:
        Unreachable: no name service knows it.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unreachable(f"{shown(host)} is no known host name ({error.strerror})") from None
    return str(found[0][4][0])


def join_store(address: Address, seconds: float) -> tuple[TCPStore, str]:
    """Connect to the store of the first machine.

    Returns:
        The store, and this machine's own IP address on the way there.

    Raises:
        Unreachable: nothing answers there.
    """
    numeric = numeric_address(address.host, address.port)
    try:
        # PyTorch's own attempt cannot say why it fails, and writes warnings.
        with socket.create_connection((numeric, address.port), timeout=seconds) as probe:
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise Unreachable(error.strerror or str(error)) from None
    store = bounded(
        lambda: TCPStore(
            numeric, address.port, None, False, timedelta(seconds=seconds), wait_for_workers=False
        ),
        seconds + 1,
    )
    return store, own


def host_store(address: Address) -> tuple[TCPStore, str]:
    """Let the store listen at the address given, and nowhere else.

    TCPStore by itself listens on every address of the machine. It is therefore given a socket
    that is bound to one.

    Returns:
        The store, and the IP address.

    Raises:
        MachineRefused: the address is not this machine's, or its port is taken.
    """
    try:
        numeric = numeric_address(address.host, address.port)
    except Unreachable as error:
        raise MachineRefused(str(address), actual=str(error)) from None
    family = socket.AF_INET6 if ":" in numeric else socket.AF_INET
    try:
        listener = socket.create_server((numeric, address.port), family=family, backlog=128)
    except OSError as error:
        raise MachineRefused(
            str(address), expected="an address of this machine with a free port",
            actual=error.strerror or str(error),
            remedy="The address is the first machine's, where the model is loaded. Another "
            "process that uses the port must end first",
        ) from None
    store = TCPStore(
        numeric, address.port, None, True, timedelta(seconds=STORE_S), wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, numeric


def make_group(
    store: TCPStore, name: str, rank: int, device: ProcessGroupGloo.Device, timeout: float
) -> Group:
    """Make a gloo group of two ranks. It returns when both are connected.

    Raises:
        Unreachable: the neighbour did not connect in time.
    """
    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._devices = [device]
    options._threads = 1
    options._timeout = timedelta(seconds=timeout)
    prefixed = PrefixStore(name, PrefixStore(_PREFIX, store))
    group: Any = bounded(lambda: gloo(prefixed, rank, 2, options), timeout + 5)
    return group


def make_links(
    store: TCPStore, own: str, session: str, place: int, count: int, timeout: float
) -> tuple[Group, Group]:
    """Connect to both neighbours.

    Args:
        own: the IP address that this machine's end of the links is bound to.

    Returns:
        The groups to the next machine and from the one before.

    Raises:
        Unreachable: a neighbour did not connect in time.
    """
    device = ProcessGroupGloo.create_device(hostname=own)

    def link(index: int, rank: int) -> Group:
        return make_group(store, f"{session}/link{index}", rank, device, timeout)

    # Each waits for its neighbour: the first machine begins, and the last link closes the ring.
    if place == 0:
        outgoing = link(0, 0)
        return outgoing, link(count - 1, 1)
    incoming = link(place - 1, 1)
    return link(place, 0), incoming


class Caller:
    """The first machine's side of a meeting.

    Args:
        address: where; its store listens already.
        board: the store's notes.
        patience: seconds to wait for machines.
        link_timeout, beat: see `link`; the other machines use the same.
        say: shows a line to the user while machines are missing.
    """

    def __init__(
        self, address: Address, board: Board, patience: float, link_timeout: float, beat: float,
        say: Callable[[str], None],
    ) -> None:
        self._address = address
        self._board = board
        self._patience = patience
        self._say = say
        self.session = uuid.uuid4().hex
        self._call = {
            "session": self.session, "timeout": link_timeout, "beat": beat,
            "hello": own_hello(0, address.world_size or 0, self.session).fields(),
        }
        # Hellos by the number under which they were written.
        self._hellos: dict[int, Hello] = {}
        self._said = ""

    def gather(self) -> tuple[Machine, ...]:
        """Call all machines and wait until they are there.

        Raises:
            MachineRefused: a machine is missing, or one does not fit.
        """
        self._board.write(_CALL, self._call)
        try:
            chosen = self._wait()
            members = self._seated(chosen)
            self._board.write(
                f"{self.session}/ring",
                {"seats": {str(number): place for place, number in enumerate(chosen, 1)},
                 "members": [[machine.rank, machine.host] for machine in members]},
            )
            return members
        except MachineRefused as error:
            self._board.write(f"{self.session}/ring", {"refused": str(error)})
            self._wait_for_readers()
            raise
        finally:
            self._board.clear(_CALL)

    def _wait(self) -> list[int]:
        """Wait for enough machines; return their numbers in the order of their ranks."""
        deadline = time.monotonic() + self._patience
        while True:
            self._read_hellos()
            chosen = self._complete()
            if chosen is not None:
                return chosen
            if time.monotonic() >= deadline:
                raise self._missing()
            self._announce()
            time.sleep(LOOK_S)

    def _wait_for_readers(self) -> None:
        """Keep the store for a moment, until all machines have read why they are refused."""
        deadline = time.monotonic() + _READERS_S
        while time.monotonic() < deadline and (
            self._board.counted(f"{self.session}/read")
            < self._board.counted(f"{self.session}/hellos")
        ):
            time.sleep(LOOK_S / 5)

    def _read_hellos(self) -> None:
        count = min(self._board.counted(f"{self.session}/hellos"), 4 * MOST_MACHINES)
        own = read_hello(self._call["hello"])
        for number in range(1, count + 1):
            if number in self._hellos:
                continue
            value = self._board.read(f"{self.session}/hello{number}")
            if value is None:
                # Its number is taken, its note comes a moment later.
                continue
            hello = read_hello(value)
            check_hello(hello, own)
            self._check_rank(hello)
            self._hellos[number] = hello
        _answer_torchrun(self._board.store)

    def _check_rank(self, hello: Hello) -> None:
        for number, other in list(self._hellos.items()):
            if other.rank == hello.rank and other.host == hello.host:
                # A process that was started again while the call was open: the later one counts.
                del self._hellos[number]
            elif other.rank == hello.rank:
                raise MachineRefused(
                    f"rank {hello.rank}", expected="one machine with each rank",
                    actual=f"{other.host} and {hello.host}",
                    remedy="Start each machine with a rank of its own",
                )
            elif other.world_size != hello.world_size:
                raise MachineRefused(
                    "the number of machines", expected="the same on all of them",
                    actual=f"{other.world_size} says {other.name}, "
                    f"{hello.world_size} says {hello.name}",
                    remedy="Start all machines with the same number",
                )
        if not 1 <= hello.rank < min(hello.world_size, MOST_MACHINES):
            raise MachineRefused(
                hello.name, expected=f"a rank from 1 to {hello.world_size - 1}",
                actual=str(hello.rank),
            )

    def _wanted(self) -> int | None:
        """Return how many other machines take part; None where nobody has said so."""
        if self._address.world_size is not None:
            return self._address.world_size - 1
        sizes = {hello.world_size for hello in self._hellos.values()}
        return sizes.pop() - 1 if sizes else None

    def _complete(self) -> list[int] | None:
        wanted = self._wanted()
        if wanted is None or len(self._hellos) < wanted:
            return None
        ordered = sorted(self._hellos, key=lambda number: self._hellos[number].rank)
        return ordered[:wanted]

    def _seated(self, chosen: list[int]) -> tuple[Machine, ...]:
        hellos = [self._hellos[number] for number in chosen]
        first = Machine(0, 0, socket.gethostname())
        return (first, *(
            Machine(place, hello.rank, hello.host) for place, hello in enumerate(hellos, 1)
        ))

    def _state(self) -> tuple[str, str]:
        """Return which machines came and which are missing, for a message."""
        hellos = sorted(self._hellos.values(), key=lambda hello: hello.rank)
        came = ", ".join(f"{hello.rank} ({hello.host})" for hello in hellos) or "none"
        wanted = self._wanted()
        if wanted is None:
            return came, "any other machine"
        ranks = {hello.rank for hello in hellos}
        missing = [rank for rank in range(1, wanted + 1) if rank not in ranks]
        if len(missing) > wanted - len(hellos):
            # Fewer machines than were started may load: any rank will do.
            return came, f"{wanted - len(hellos)} of the machines"
        return came, "rank " + ", ".join(map(str, missing))

    def _announce(self) -> None:
        came, missing = self._state()
        line = f"waiting at {self._address} for {missing}; ranks that came: {came}"
        if line != self._said:
            self._said = line
            self._say(line)

    def _missing(self) -> MachineRefused:
        came, missing = self._state()
        fewer = (
            f" ?world_size={len(self._hellos) + 1} behind the address loads with those that came"
            if self._hellos else ""
        )
        return MachineRefused(
            f"{self._address}: machines are missing after {self._patience:g} s",
            expected=missing, actual=f"ranks that came: {came}",
            remedy="Start `python -m exl_loader serve-stage` there with this address, and look at "
            f"what it prints.{fewer}",
        )


# torchrun's agents: what the agent of the first machine would write.
_TORCHRUN = "none/torchelastic"


def _answer_torchrun(store: PrefixStore) -> None:
    """Give torchrun's agents their ranks, where no agent of the first machine does.

    On the other machines `torchrun --node-rank R` waits until the agent with rank 0 has read all
    agents' notes and has written each one's rank. A front end that was started without torchrun
    does this in its place.
    """
    plain = store.underlying_store
    for rank in range(1, MOST_MACHINES):
        if not plain.check([f"{_TORCHRUN}/role_info/{rank}"]):
            continue
        key = f"{_TORCHRUN}/assigned_ranks/{rank}"
        if not plain.check([key]):
            plain.set(key, json.dumps([rank, MOST_MACHINES, rank, MOST_MACHINES]))


class Guest:
    """Another machine's side of meetings. It answers each call once.

    Args:
        seat: the first machine's address, and this machine's rank.
        say: shows a line to the user; the same line is not repeated.
    """

    def __init__(self, seat: Seat, say: Callable[[str], None]) -> None:
        self._seat = seat
        self._say = say
        self._said = ""
        self._answered = ""
        self._hello = own_hello(seat.rank, seat.world_size, uuid.uuid4().hex)

    def attend(self, is_closed: Callable[[], bool]) -> Invitation | None:
        """Wait until the first machine has placed this one in a ring.

        Returns:
            Where, or None as soon as `is_closed` returns True.
        """
        while not is_closed():
            try:
                store, own = join_store(self._seat.address, STORE_S)
                self._tell(f"connected to {self._seat.address}; waiting for a model to be loaded")
                found = self._answer(store, own, is_closed)
                if found is not None:
                    return found
            except Unreachable as error:
                self._tell(f"waiting for the first machine at {self._seat.address}: {error}")
            except MachineRefused as error:
                self._tell(str(error))
            time.sleep(4 * LOOK_S)
        return None

    def _tell(self, line: str) -> None:
        if line != self._said:
            self._said = line
            self._say(line)

    def _answer(
        self, store: TCPStore, own: str, is_closed: Callable[[], bool]
    ) -> Invitation | None:
        board = Board(store)
        while not is_closed():
            call = board.read(_CALL)
            session = str(call.get("session")) if isinstance(call, dict) else None
            if session is not None and session != self._answered:
                self._answered = session
                number = board.number(f"{session}/hellos")
                board.write(f"{session}/hello{number}", self._hello.fields())
                found = self._placed(board, store, own, call, number, is_closed)
                if found is not None:
                    return found
            time.sleep(LOOK_S)
        return None

    def _placed(
        self, board: Board, store: TCPStore, own: str, call: dict[str, Any], number: int,
        is_closed: Callable[[], bool],
    ) -> Invitation | None:
        """Wait for the ring of this call; None where it has no place for this machine."""
        session = call["session"]
        while not is_closed():
            # Read before the ring: a ring is written before the call is taken back.
            still = board.read(_CALL)
            ring = board.read(f"{session}/ring")
            if isinstance(ring, dict):
                if "refused" in ring:
                    board.number(f"{session}/read")
                    self._tell(f"the first machine refuses: {shown(ring['refused'], 1000)}")
                    return None
                place = ring.get("seats", {}).get(str(number))
                return None if place is None else self._invited(store, own, call, ring, place)
            if not isinstance(still, dict) or still.get("session") != session:
                return None
            time.sleep(LOOK_S)
        return None

    def _invited(
        self, store: TCPStore, own: str, call: dict[str, Any], ring: dict[str, Any], place: int
    ) -> Invitation:
        try:
            members = tuple(
                Machine(index, int(rank), str(host)[:200])
                for index, (rank, host) in enumerate(ring["members"])
            )
            timeout, beat = float(call["timeout"]), float(call["beat"])
            if not 0 < place < len(members) <= MOST_MACHINES:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise MachineRefused(
                "the first machine", expected="an order of machines", actual=shown(ring, 200)
            ) from None
        return Invitation(store, own, call["session"], place, members, timeout, beat)


class Invitation:
    """Another machine's place in a ring that is about to be connected."""

    def __init__(
        self, store: TCPStore, own: str, session: str, place: int, members: tuple[Machine, ...],
        timeout: float, beat: float,
    ) -> None:
        self.place = place
        self.members = members
        self.timeout = timeout
        self.beat = beat
        self._store = store
        self._own = own
        self._session = session

    def connect(self) -> tuple[Group, Group]:
        """Connect to both neighbours.

        Raises:
            Unreachable: one did not connect in time.
        """
        return make_links(
            self._store, self._own, self._session, self.place, len(self.members), LINK_S
        )


def meet(
    address: Address, patience: float, timeout: float, beat: float, say: Callable[[str], None]
) -> tuple[tuple[Machine, ...], Group, Group, TCPStore]:
    """Bring all machines together, as the first of them.

    Returns:
        The machines in the order of the ring, the groups to the next and from the last one, and
        the store, which listens as long as it is referred to.

    Raises:
        MachineRefused: a machine is missing or does not fit; or the address is not usable.
        MachineLost: a machine that had answered did not connect.
    """
    try:
        store, own = join_store(address, STORE_S) if address.agent else host_store(address)
        caller = Caller(address, Board(store), patience, timeout, beat, say)
        members = caller.gather()
        # With a connection of their own, so that links that end late do not keep the port.
        joined, _ = join_store(address, STORE_S)
        outgoing, incoming = make_links(joined, own, caller.session, 0, len(members), LINK_S)
    except Unreachable as error:
        raise MachineLost(
            str(address), actual=f"the machines could not be connected: {error}",
            remedy="See what the other machines print",
        ) from None
    return members, outgoing, incoming, store


