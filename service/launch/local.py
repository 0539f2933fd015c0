"""The local runtime: one replica and its HTTP server in this process, without Ray.

The main thread runs the event loop with uvicorn, which listens before anything heavy is imported. A thread of its own
imports torch, checks the checkpoint and loads the model; until then ``http.starting`` answers.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn
from rich.console import Console
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api_keys import ApiKeys
from service.errors import EngineUnavailable, ServerStartError, SettingsError, StartupError
from service.http.access_log import AccessLog
from service.http.disconnect import CancelOnDisconnect
from service.http.open_requests import OpenRequests
from service.http.starting import create_starting_app
from service.http.unread_refusals import Gate
from service.launch.accepting import ConnectionAcceptor
from service.launch.exposure import keys_for
from service.launch.ports import reachable, reserved_http
from service.launch.private_folder import private_folder
from service.launch.progress import TerminalProgress
from service.launch.shedding import SheddingProtocol
from service.launch.slow_heads import allow_many_files, close_slow_heads
from service.launch.start import DRAIN_S, cores_per_replica, log_path, write_at_the_end
from service.launch.start_settings import StartSettings
from service.launch.supervisor import STOP_AFTER_S, STOPPED_EARLY, StopRequested, sweep
from service.launch.tls import tls_options
from service.settings import Settings

if TYPE_CHECKING:
    from service.assembly import OpenedModel, ServedModel
    from service.http.tracing import RequestTracer

REPLICA = "local"
"""Value of the label ``replica`` in ``/metrics``."""
HEALTH_CHECK_S = 0.5
"""Seconds between two checks of the engine."""
KEEP_ALIVE_S = 90
"""Seconds that an idle connection stays open; as with Ray Serve."""
REFUSE_S = 0.5
"""Longest time for ending the requests that are not answered, while a pass hangs."""
SEND_S = 2.0
"""Longest time for rendering and sending answers that are computed, once the scorer has stopped."""
BACKLOG = 2048
"""Connections that the kernel holds until they are accepted."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_Result = TypeVar("_Result")


def serve_locally(settings: StartSettings, console: Console, *, opens_page: bool = False) -> None:
    """Run the service in this process until SIGINT or SIGTERM.

    Args:
        settings: all settings.
        console: where progress is shown.
        opens_page: whether a browser is to show the page once the service answers.

    Raises:
        StartupError: a setting needs Ray, the port is taken, the checkpoint is refused, or the engine has failed.
        StopRequested: the server was asked to stop, and has stopped.
    """
    refuse_settings_of_ray(settings)
    allow_many_files()
    api_keys = keys_for(settings.security, settings.server.host)
    tls = tls_options(settings.server)
    server: _LocalServer | None = None
    try:
        with ExitStack() as stack:
            stack.enter_context(reserved_http(settings.server.host, settings.server.port))
            listener = stack.enter_context(_listening(settings.server.host, settings.server.port))
            access_log = stack.enter_context(_access_log(settings.log))
            url = f"{'https' if tls else 'http'}://{reachable(settings.server.host)}:{listener.getsockname()[1]}"
            progress = stack.enter_context(
                TerminalProgress(console, url, opens_page=opens_page, needs_key=api_keys is not None)
            )
            server = _LocalServer(replica_settings(settings), listener, access_log, progress, api_keys, tls)
            server.run()
    except StopRequested as stop:
        if server is not None and server.has_running_threads:
            if not stop.after_ready:
                console.print(STOPPED_EARLY, markup=False)
            _end_process(stop.status)
        raise


def refuse_settings_of_ray(settings: StartSettings) -> None:
    """Check that no setting asks for what only Ray Serve has.

    Raises:
        SettingsError: there is to be more than one replica.
    """
    replicas = settings.server.replicas
    if replicas > 1:
        raise SettingsError(
            f"runtime is local, which runs one replica, but server.replicas is {replicas}: leave --replicas out, or "
            "take --runtime ray."
        )


def replica_settings(settings: StartSettings) -> Settings:
    """The settings of the replica: as with Ray it computes on all cores unless a number of threads is set."""
    served = settings.served_model()
    num_threads = settings.model.num_threads or cores_per_replica(1)
    return served.model_copy(update={"model": served.model.model_copy(update={"num_threads": num_threads})})


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens on the address; no other server can share the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ServerStartError(f"Cannot listen on {host} port {port}: {reason}.") from None
        yield listener


@contextmanager
def _access_log(choice: str | None) -> Iterator[AccessLog]:
    """The access log: standard output for ``-``, the file that the settings name, else a file in a private folder.

    Raises:
        SettingsError: the file cannot be written.
        ServerStartError: the private folder cannot be made.
    """
    with ExitStack() as stack:
        path = None if choice == "-" else log_path(choice, stack.enter_context(private_folder()))
        for descriptor in (1, 2):
            write_at_the_end(descriptor)
        log = AccessLog(path, descriptor=1)
        stack.callback(log.close)
        yield log


class _HttpServer(uvicorn.Server):
    """uvicorn that accepts connections as `ConnectionAcceptor` does.

    It has no signal handlers of its own: the runtime drains the scorer before the server stops.
    """

    _acceptor: ConnectionAcceptor | None = None

    def __init__(self, config: uvicorn.Config, gate: Gate) -> None:
        super().__init__(config)
        self._gate = gate

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        for listener in sockets or []:
            self._acceptor = ConnectionAcceptor(listener, self._new_protocol, self.config.ssl)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._acceptor is not None:
            self._acceptor.stop()
        await super().shutdown(sockets)

    def _new_protocol(self) -> asyncio.Protocol:
        return SheddingProtocol(self._gate, self.config, self.server_state, self.lifespan.state)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _ReplaceableApp:
    """ASGI application that forwards to another one, which is replaced once the model is loaded."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class _LocalServer:
    """One replica with its HTTP server; ``run`` is called once, in the main thread."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        access_log: AccessLog,
        progress: TerminalProgress,
        api_keys: ApiKeys | None,
        tls: Mapping[str, Any],
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._access_log = access_log
        self._progress = progress
        self._api_keys = api_keys
        self._open_requests = OpenRequests()
        self._gate = Gate()
        self._app = _ReplaceableApp(create_starting_app(access_log, self._open_requests, page=settings.page.enabled))
        self._config = uvicorn.Config(
            CancelOnDisconnect(self._app),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # malformed HTTP is the client's business; exceptions are in the access log
            access_log=False,  # the service writes its own
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
            **tls,
        )
        self._signals: list[int] = []
        self._is_ready = False
        self._loader: threading.Thread | None = None
        self._served: ServedModel | None = None
        self._tracer: RequestTracer | None = None

    @property
    def has_running_threads(self) -> bool:
        """Whether threads still load the model or compute; the interpreter would wait for them at its end."""
        return (self._loader is not None and self._loader.is_alive()) or (
            self._served is not None and self._served.scorer.is_engine_alive
        )

    def run(self) -> None:
        """Load the model and serve it.

        Raises:
            StartupError: the model is refused or does not run, or the engine has failed.
            StopRequested: by a signal; accepted requests have been answered.
        """
        runner = asyncio.Runner(loop_factory=self._config.get_loop_factory())
        try:
            runner.run(self._run())
        finally:
            if not self.has_running_threads:  # which closing the loop would wait for
                runner.close()

    async def _run(self) -> None:
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        self._handle_signals(asyncio.get_running_loop())
        server = _HttpServer(self._config, self._gate)
        serving = asyncio.create_task(server.serve([self._listener]))
        closing = asyncio.create_task(close_slow_heads(server.server_state.connections))
        running = asyncio.create_task(self._load_and_watch())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({serving, running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            if serving.done():
                raise ServerStartError("The HTTP server has ended by itself.")
            running.cancel()
            await self._drain()
            raise self._stop_request()
        except StartupError:
            await self._refuse_accepted()
            raise
        finally:
            await self._open_requests.wait_until_none(SEND_S)
            closing.cancel()
            server.should_exit = True
            with suppress(Exception):
                await serving
            if self._tracer is not None:
                await asyncio.to_thread(self._tracer.close)

    def _handle_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        def request(number: int, _frame: object) -> None:
            self._signals.append(number)
            with suppress(RuntimeError):  # the loop is closed: the process is ending
                loop.call_soon_threadsafe((self._stop if len(self._signals) == 1 else self._hurry).set)

        # Not add_signal_handler: it would restore the default, which kills, when the loop ends.
        for number in _STOP_SIGNALS:
            signal.signal(number, request)

    def _stop_request(self) -> StopRequested:
        return StopRequested(self._signals[0], after_ready=self._is_ready)

    async def _load_and_watch(self) -> None:
        """Load the model, report that it is ready, and return only by an exception."""
        served = await self._load()
        self._is_ready = True
        self._progress.ready(served.summary)
        while True:
            await asyncio.sleep(HEALTH_CHECK_S)
            try:
                served.scorer.check_health()
            except EngineUnavailable as error:
                raise ServerStartError(str(error)) from None

    async def _load(self) -> ServedModel:
        """Load and warm up the model, and let its application answer."""
        opened: OpenedModel | None = None
        with _without_garbage_collection():
            if self._settings.model.engine != "oracle":
                self._progress.stage("checkpoint")
                opened = await self._in_loader(lambda: _open(self._settings))
            self._progress.stage("model")
            served, self._app.app = await self._in_loader(lambda: self._assemble(opened))
        self._served = served
        if served.checkpoint is not None:
            self._progress.note(served.tokenization.rule.sentence)
        await served.scorer.start()
        return served

    def _assemble(self, opened: OpenedModel | None) -> tuple[ServedModel, ASGIApp]:
        from service.assembly import assemble
        from service.http.routes import create_app
        from service.http.tracing import request_tracer
        from service.metrics import merge_expositions

        served = assemble(self._settings, opened=opened)
        self._tracer = request_tracer(
            self._settings.tracing, model=served.identity.name, version=served.identity.version, replica=REPLICA
        )

        async def exposition() -> str:
            # Labelled as with Ray, so that dashboards and alerts are the same.
            own = {REPLICA: served.metrics.render().decode()}
            return await asyncio.to_thread(merge_expositions, own, incomplete=False)

        app = create_app(
            served,
            exposition,
            self._access_log,
            self._open_requests,
            api_keys=self._api_keys,
            livez_checks_engine=True,
            tracer=self._tracer,
        )
        self._gate.refusals = app.state.unread_refusals
        return served, app

    async def _in_loader(self, load: Callable[[], _Result]) -> _Result:
        """Return the result of a function that runs in a daemon thread, which a stop does not wait for."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[_Result] = loop.create_future()

        def resolve(set_value: Callable[[Any], None], value: object) -> None:
            if not loaded.done():
                set_value(value)

        def run() -> None:
            try:
                value = load()
            except BaseException as error:  # noqa: BLE001 - it is raised in the event loop
                arguments: tuple[Any, ...] = (loaded.set_exception, _start_error(error))
            else:
                arguments = (loaded.set_result, value)
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(resolve, *arguments)

        self._loader = threading.Thread(target=run, name="loader", daemon=True)
        self._loader.start()
        return await loaded

    async def _drain(self) -> None:
        """Answer what is accepted for up to ``DRAIN_S``, or until a second signal; what is left gets Draining."""
        _end_process_after(STOP_AFTER_S, self._stop_request().status)
        self._progress.stopping(ready=self._is_ready)
        if self._served is None or self._served.scorer.state == "starting":
            return  # nothing has been accepted
        scorer = self._served.scorer
        draining = asyncio.create_task(scorer.stop(DRAIN_S))
        hurrying = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            await self._refuse_accepted()

    async def _refuse_accepted(self) -> None:
        """Answer every accepted request with an error now, without waiting for a pass that runs."""
        if self._served is not None:
            await asyncio.wait({asyncio.create_task(self._served.scorer.stop(0.0))}, timeout=REFUSE_S)


def _open(settings: Settings) -> OpenedModel:
    from service.assembly import open_model

    return open_model(settings.model)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Collect no cycles while modules are imported and the model is loaded, nor ever again among what is made then.

    Nearly all of it lives as long as the process. Searching it again and again takes a tenth of the imports' time.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _start_error(error: BaseException) -> BaseException:
    """The error that the start ends with; what nobody foresaw becomes one sentence, as with Ray."""
    if isinstance(error, StartupError):
        return error
    last_line = (str(error).strip().splitlines() or ["no message"])[-1]
    failure = ServerStartError(f"{type(error).__name__}: {last_line.rstrip('.')}.")
    failure.__cause__ = error
    return failure


def _end_process_after(seconds: float, status: int) -> None:
    """End the process after some seconds, if a thread that hangs still keeps it from ending."""
    timer = threading.Timer(seconds, _end_process, [status])
    timer.daemon = True
    timer.start()


def _end_process(status: int) -> None:
    """End the process at once, with its child processes (compilers), and without waiting for its threads."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    sweep()
    os._exit(status)
