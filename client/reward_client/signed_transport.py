"""A transport that asks for a signature of each answer and returns no answer without one."""

from __future__ import annotations

import httpx2

from reward_client.errors import BadAnswer
from reward_client.signatures import NONCE_HEADER, SIGNATURE_HEADER, is_signature_of, new_nonce


class SignedTransport(httpx2.AsyncBaseTransport):
    """Checks the signature of every 200 to a POST.

    Args:
        transport: sends the requests.
        key: of the signatures.
    """

    def __init__(self, transport: httpx2.AsyncBaseTransport, key: bytes) -> None:
        self._transport = transport
        self._key = key

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request; return its answer.

        Raises:
            BadAnswer: it is not signed, or its signature is of another answer or of another request.
        """
        if request.method != "POST":
            return await self._transport.handle_async_request(request)
        nonce = new_nonce()
        request.headers[NONCE_HEADER] = nonce
        answer = await self._transport.handle_async_request(request)
        if answer.status_code != httpx2.codes.OK:
            return answer
        sent, received = await request.aread(), await answer.aread()
        signature = answer.headers.get(SIGNATURE_HEADER)
        if not is_signature_of(signature, self._key, nonce, sent, received):
            reason = "has no signature" if signature is None else "has the signature of another answer or request"
            raise BadAnswer(f"The answer {reason}: it may not be of the service, or not to this request")
        return answer

    async def aclose(self) -> None:
        """Close the connections."""
        await self._transport.aclose()
