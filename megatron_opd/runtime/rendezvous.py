"""Where ranks meet: a torch TCPStore that listens on one address only, and on a port that was free."""

import socket
from datetime import timedelta

import torch.distributed as dist


def listening_store(host: str, timeout_s: float) -> dist.TCPStore:
    """A store on a free port of `host`. torch by itself would listen on every address of the machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, backlog=1024) as server:
        port = server.getsockname()[1]
        return dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s), master_listen_fd=server.detach()
        )
