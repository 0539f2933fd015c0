"""Cancel a request whose client has closed its connection, so that its items are not computed for nobody.

Ray Serve does this for its replicas. A plain ASGI server only reports the disconnect to whoever asks for it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CancelOnDisconnect:
    """ASGI application around another one, whose task it cancels when the client leaves before the answer is sent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        request = asyncio.current_task()
        if scope["type"] != "http" or request is None:
            await self._app(scope, receive, send)
            return
        watcher: asyncio.Task[None] | None = None
        is_answered = has_left = False

        async def watch() -> None:
            nonlocal has_left
            while (await receive())["type"] != "http.disconnect":
                pass
            if not is_answered:  # servers report a disconnect after every complete answer, too
                has_left = True
                request.cancel()

        async def receive_body() -> Message:
            nonlocal watcher
            message = await receive()
            # Only once the body is complete: until then the application itself waits for messages.
            if watcher is None and message["type"] == "http.request" and not message.get("more_body", False):
                watcher = asyncio.create_task(watch())
            return message

        async def send_answer(message: Message) -> None:
            nonlocal is_answered
            is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive_body, send_answer)
        except asyncio.CancelledError:
            if not has_left:
                raise
        finally:
            if watcher is not None and not watcher.done():
                watcher.cancel()
                with suppress(asyncio.CancelledError):
                    await watcher
            if has_left:
                request.uncancel()
