"""The client of a served ensemble, synchronous and asynchronous; needs httpx alone, neither Ray nor torch.

with Client("http://127.0.0.1:8000") as client:
    reply = client.predict("Where is the Louvre?")
    print(reply.answer if reply.decision == "answer" else reply.reason)

`AsyncClient` does the work; `Client` runs it for threads. `protocol` says what is sent and how replies are read, without
any network; `words` says what a reply means.
"""

from stitch_ray.client.asynchronous import AsyncClient
from stitch_ray.client.errors import ApiError, ClientError, TimedOut, Unreachable
from stitch_ray.client.reply import Reply
from stitch_ray.client.synchronous import Client

__all__ = ["ApiError", "AsyncClient", "Client", "ClientError", "Reply", "TimedOut", "Unreachable"]
