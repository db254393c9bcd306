"""A rendezvous for torch.distributed.launch that nobody reaches from another machine.

torch's own store listens on all addresses of a machine, and whoever reaches it can take part in
the job. This one listens on 127.0.0.1; launcher.sh chooses it by --rdzv-backend=loopback, and
torch finds it by loopback.egg-info beside this file.
"""

import socket
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

HOST = "127.0.0.1"
PATIENCE = timedelta(minutes=15)  # as torch's own


class Loopback(RendezvousHandler):
    """The rendezvous of an agent that has no others to meet.

    Args:
        port: to listen on; 0 for a free one.
        run_id: of the job.
    """

    use_agent_store = True  # the workers meet there too

    def __init__(self, port: int, run_id: str) -> None:
        self.port, self.run_id = port, run_id
        self.store: PrefixStore | None = None

    def get_backend(self) -> str:
        return "loopback"

    def next_rendezvous(self) -> RendezvousInfo:
        # A new store for every round: the next workers must not meet what failed ones have left.
        listener = socket.create_server((HOST, self.port), backlog=2048)
        self.port, port = 0, listener.getsockname()[1]  # the agent keeps the first one open
        store = TCPStore(
            HOST,
            port,
            is_master=True,
            multi_tenant=True,
            timeout=PATIENCE,
            master_listen_fd=listener.detach(),
        )
        self.store = PrefixStore(self.run_id, store)
        return RendezvousInfo(self.store, 0, 1, RendezvousStoreInfo(HOST, port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        return

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.run_id

    def shutdown(self) -> bool:
        return True


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torch's registry asks a plug-in for: the function that makes a handler."""

    def make(parameters: RendezvousParameters) -> RendezvousHandler:
        return Loopback(int(parameters.endpoint.rpartition(":")[2]), parameters.run_id)

    return make
