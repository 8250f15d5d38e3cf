"""The demo's server: a page and the answer to an image, for browsers on this machine only."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable

import torch
from aiohttp import web

import bit_ray
from bit_ray.data.images.decode import ImageError
from bit_ray.demo.answer import MAX_BYTES, answer
from bit_ray.demo.config import DemoConfig
from bit_ray.errors import ConfigError
from bit_ray.inference.classifier import Classifier, load_model
from bit_ray.inference.named import saved_model
from bit_ray.plots.page import render_page
from bit_ray.progress import console

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_HOST = "127.0.0.1"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def serve(config: DemoConfig) -> None:
    """Serve the page of a model until the process is interrupted.

    Raises:
        BitRayError: Anything the user can fix.
        KeyboardInterrupt: Ctrl-C.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    uri = None
    if config.model.startswith("models:/"):
        from bit_ray.tracking.address import tracking_uri  # MLflow, which only these names need

        uri = tracking_uri(config.tracking.uri, config.storage)
    classifier = load_model(saved_model(config.model, config.storage), tracking_uri=uri, device=device)
    asyncio.run(_serve(classifier.spec.provenance.get("run_name") or config.model, classifier, config.port))


def application(name: str, classifier: Classifier) -> web.Application:
    """Return the demo as an application of aiohttp.

    It answers only to requests by the names of this machine's loopback, so that no page of another name that resolves
    to 127.0.0.1 can use it (DNS rebinding), and takes images only from its own page.
    """
    turn = asyncio.Lock()
    spec = classifier.spec
    classes = f"{spec.num_classes:,} {'class' if spec.num_classes == 1 else 'classes'}"
    summary = f"{classes}, sees {spec.crop_size} x {spec.crop_size} pixels. bit_ray {bit_ray.__version__}."

    async def page(request: web.Request) -> web.Response:
        text = render_page(
            "demo/page.html.jinja", name=name, summary=summary, nonce=secrets.token_urlsafe(16), max_bytes=MAX_BYTES
        )
        return web.Response(text=text, content_type="text/html")

    async def classify(request: web.Request) -> web.Response:
        # Another page's script cannot send this type without asking first, and is refused when it asks.
        if request.content_type != "application/octet-stream" or not _same_origin(request):
            return web.json_response({"error": "Images are taken from the page of the demo only."}, status=403)
        try:
            data = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return _refused(f"More than {MAX_BYTES // 1_000_000} MB; accepted: a smaller image file.", 413)
        async with turn:  # one at a time: each takes all cores and up to a gigabyte
            try:
                found = await asyncio.to_thread(answer, classifier, data)
            except ImageError as error:
                return _refused(f"This is no image that can be read: {error.reason}.", 400)
        return web.json_response(found)

    app = web.Application(client_max_size=MAX_BYTES, middlewares=[_local_only])
    app.add_routes([web.get("/", page), web.post("/classify", classify)])
    return app


def _refused(text: str, status: int) -> web.Response:
    return web.json_response({"error": text}, status=status)


def _same_origin(request: web.Request) -> bool:
    """Return whether a browser says that the request is of a page from here; other programs say nothing."""
    origin = request.headers.get("Origin")
    return origin is None or origin == f"http://{request.host}"


@web.middleware
async def _local_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse requests by another name than the loopback's, and add the headers that keep other pages out."""
    name, _, port = request.host.rpartition(":")
    socket = request.transport.get_extra_info("sockname") if request.transport else None
    if name not in ("127.0.0.1", "localhost") or not socket or port != str(socket[1]):
        return web.Response(status=403, text="This demo answers to 127.0.0.1 and localhost only.\n", headers=_HEADERS)
    try:
        response = await handler(request)
    except web.HTTPException as error:
        error.headers.update(_HEADERS)
        raise
    response.headers.update(_HEADERS)
    return response


async def _serve(name: str, classifier: Classifier, port: int) -> None:
    runner = web.AppRunner(application(name, classifier), access_log=None, handle_signals=False)
    await runner.setup()
    try:
        site = web.TCPSite(runner, _HOST, port)
        try:
            await site.start()
        except OSError as error:
            given = f"{port} on {_HOST} cannot be used ({error.strerror or error})"
            raise ConfigError.of("port", given, "a free port", "choose another, or leave it out") from None
        url = f"http://{_HOST}:{runner.addresses[0][1]}/"
        console.print(f"{name}: {url}   (Ctrl-C ends it)")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
