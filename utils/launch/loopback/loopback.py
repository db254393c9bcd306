"""A rendezvous for torch.distributed.launch that other machines cannot reach.

The store of torch listens on all addresses of a machine, and any process that reaches it can take
part in the job. This one listens on 127.0.0.1. The launcher selects it with
--rdzv-backend=loopback, and torch finds it through loopback.egg-info beside this file.
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
TIMEOUT = timedelta(minutes=15)  # The default of torch's own store.


class Loopback(RendezvousHandler):
    """The rendezvous of the only agent of a job."""

    use_agent_store = True  # The workers use the same store.

    def __init__(self, port: int, run_id: str) -> None:
        """Create a rendezvous.

        Args:
            port: The port to listen on; 0 for a free one.
            run_id: The id of the job.
        """
        self.port, self.run_id = port, run_id

    def get_backend(self) -> str:
        """Return the name of this kind of rendezvous."""
        return "loopback"

    def next_rendezvous(self) -> RendezvousInfo:
        """Open a store and return it with the rank of this agent, which is 0 of 1."""
        # Every round has a new store, so that new workers do not find the keys of failed ones.
        listener = socket.create_server((HOST, self.port), backlog=2048)
        # The agent keeps the first store open, so later ones take a free port.
        self.port, port = 0, listener.getsockname()[1]
        store = TCPStore(
            HOST,
            port,
            is_master=True,
            multi_tenant=True,
            timeout=TIMEOUT,
            master_listen_fd=listener.detach(),
        )
        bootstrap = RendezvousStoreInfo(HOST, port)
        return RendezvousInfo(PrefixStore(self.run_id, store), 0, 1, bootstrap)

    def is_closed(self) -> bool:
        """Return False: this rendezvous is never closed."""
        return False

    def set_closed(self) -> None:
        """Do nothing: no other agent would learn of it."""

    def num_nodes_waiting(self) -> int:
        """Return 0: no other agent can join."""
        return 0

    def get_run_id(self) -> str:
        """Return the id of the job."""
        return self.run_id

    def shutdown(self) -> bool:
        """Return True: there is nothing to shut down."""
        return True


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """Return the function that creates handlers, as torch's registry expects of a plug-in."""

    def make(parameters: RendezvousParameters) -> RendezvousHandler:
        return Loopback(int(parameters.endpoint.rpartition(":")[2]), parameters.run_id)

    return make
