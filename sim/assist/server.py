"""``fedrx assist``: the same list on a local page, decided by a clinician; research only.

Bound to loopback, for one person: the address carries a one-time secret that becomes a cookie, so
that other users of the machine and other pages in the same browser get nothing. Requests for
another host (DNS rebinding), from another origin, or without the cookie are refused. The page may
load nothing and connect to nothing but itself.
"""

import datetime
import json
import os
import secrets
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse

from common.errors import UserError
from common.files import json_line, utf8, writable
from sim.assist.patient_form import FormProblems, PatientRequest, read_form
from sim.assist.suggest import Suggestion, Surroundings
from sim.report.page import render

HOST = "127.0.0.1"
DECISIONS = "decisions.jsonl"
_LARGEST_BODY_BYTES = 64 * 1024
_KEPT_SUGGESTIONS = 200
_LONGEST_DRUG = 200
_LONGEST_NOTE = 2000
_MOST_ADDED = 100


class Suggester(Protocol):
    """What the page needs of ``sim.assist.suggest.Assistant``."""

    @property
    def surroundings(self) -> Surroundings:
        """Titles to search and admissions to compare."""

    def suggest(self, request: PatientRequest) -> Suggestion:
        """Answer for one patient."""


@dataclass(kw_only=True)
class Desk:
    """The state of one page: what it was asked, and where decisions go."""

    suggester: Suggester
    decisions: Path
    about: Mapping[str, Any]
    """``run``, ``checkpoint``, ``backbone``, ``source``: shown, and stored with each decision."""
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    asked: "OrderedDict[str, tuple[PatientRequest, Suggestion]]" = field(
        default_factory=OrderedDict
    )

    def remember(self, request: PatientRequest, suggestion: Suggestion) -> str:
        """Keep a suggestion until it is decided; the oldest of many is forgotten."""
        name = secrets.token_hex(8)
        self.asked[name] = request, suggestion
        while len(self.asked) > _KEPT_SUGGESTIONS:
            self.asked.popitem(last=False)
        return name


def cookie_name(port: int) -> str:
    """Name a page's cookie: browsers share cookies over ports, and two pages may be open.

    >>> cookie_name(8080)
    'fedrx-assist-8080'
    """
    return f"fedrx-assist-{port}"


def make_app(desk: Desk, *, port: int) -> FastAPI:
    """Return the page's application.

    Args:
        desk: Its state.
        port: Where it is served, for the check of hosts and origins.
    """
    app = FastAPI(title="FedRx assist", docs_url=None, redoc_url=None, openapi_url=None)
    hosts = {f"{name}:{port}" for name in (HOST, "localhost")}
    cookie = cookie_name(port)
    index = desk.suggester.surroundings.index
    about = {
        **desk.about,
        "titles": index.origin,
        "support": desk.suggester.surroundings.note,
        "supported": desk.suggester.surroundings.support is not None,
        "decisions": str(desk.decisions),
    }
    page = render(
        "assist.html",
        styles=("base.css", "assist.css"),
        script="assist.js",
        data=about,
        connect="'self'",
    )

    @app.middleware("http")
    async def guard(
        request: Request, proceed: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        refusal = _refusal(request, hosts, cookie, desk.secret)
        response = refusal if refusal is not None else await proceed(request)
        response.headers.update(
            {
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "X-Frame-Options": "DENY",
                "Referrer-Policy": "no-referrer",
                "Cross-Origin-Resource-Policy": "same-origin",
                "Cross-Origin-Opener-Policy": "same-origin",
            }
        )
        return response

    @app.exception_handler(FormProblems)
    async def tell(request: Request, error: FormProblems) -> Response:
        return _problem(error.problems)

    @app.get("/")
    async def show(request: Request) -> Response:
        if "token" in request.query_params:
            response: Response = RedirectResponse("/", status_code=303)
            response.set_cookie(cookie, desk.secret, httponly=True, samesite="strict", path="/")
            return response
        return HTMLResponse(page)

    @app.get("/api/diagnoses")
    async def diagnoses(q: str = "") -> Response:
        found = index.search(q[:100], limit=12)
        return JSONResponse([{"code": d.code, "label": d.label, "title": d.title} for d in found])

    @app.post("/api/suggest")
    async def suggest(request: Request) -> Response:
        patient = read_form((await _body(request))[0], index)
        suggestion = await run_in_threadpool(desk.suggester.suggest, patient)
        return JSONResponse({"id": desk.remember(patient, suggestion), **suggestion.as_dict()})

    @app.post("/api/decision")
    async def decide(request: Request) -> Response:
        body, escaped = await _body(request)
        asked = desk.asked.get(str(body.get("id")))
        if asked is None:
            return _problem(
                {"decision": "This list is no longer known here. Ask for a new one, then decide."}
            )
        record = decision_record(*asked, body) | ({"escaped_texts": escaped} if escaped else {})
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            append_private(desk.decisions, {"time": now, **desk.about, **record})
        except OSError as error:
            return _problem({"decision": f"The decision could not be stored: {error.strerror}."})
        del desk.asked[str(body["id"])]
        return JSONResponse({"stored": str(desk.decisions), "escaped_texts": escaped})

    return app


def decision_record(
    request: PatientRequest, suggestion: Suggestion, body: Mapping[str, Any]
) -> dict[str, Any]:
    """Check a decision against the list it is about.

    Args:
        request: The patient.
        suggestion: The list.
        body: ``marks``: ``keep`` or ``remove`` for each drug in order; ``added``: names; ``note``.

    Raises:
        FormProblems: If a drug is undecided, or something is not what it should be.
    """
    names = [drug.name for drug in suggestion.drugs]
    marks, added, note = (body.get(key) for key in ("marks", "added", "note"))
    if not isinstance(marks, list) or len(marks) != len(names):
        raise FormProblems({"decision": "The decision is not about this list. Ask again."})
    undecided = sum(mark not in ("keep", "remove") for mark in marks)
    if undecided:
        raise FormProblems(
            {"decision": f"{undecided} of {len(names)} drugs are undecided: keep or remove each."}
        )
    if not isinstance(added, list) or len(added) > _MOST_ADDED:
        raise FormProblems({"decision": f"At most {_MOST_ADDED} drugs can be added."})
    if not all(isinstance(name, str) and 0 < len(name.strip()) <= _LONGEST_DRUG for name in added):
        raise FormProblems(
            {"decision": f"An added drug needs a name of at most {_LONGEST_DRUG} characters."}
        )
    if not isinstance(note, str) or len(note) > _LONGEST_NOTE:
        raise FormProblems({"decision": f"The note is longer than {_LONGEST_NOTE} characters."})
    paired = list(zip(names, marks, strict=True))
    return {
        "patient": request.as_dict(),
        "suggested": names,
        "in_format": suggestion.in_format,
        "kept": [name for name, mark in paired if mark == "keep"],
        "removed": [name for name, mark in paired if mark == "remove"],
        "added": [" ".join(name.split()) for name in added],
        "note": note.strip(),
    }


def append_private(target: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line to a file that only its owner can read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(handle, "ab") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(utf8(json_line(record)))
        file.flush()
        os.fsync(file.fileno())


def open_socket(port: int) -> socket.socket:
    """Bind a loopback port; 0 takes a free one.

    Raises:
        UserError: If the port is taken.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError as error:
        listening.close()
        raise UserError(
            f"--port {port}: {error.strerror}", allowed="a free port", fix="--port 0 takes one"
        ) from None
    return listening


def make_server(desk: Desk, listening: socket.socket) -> uvicorn.Server:
    """Return the server of the page; nothing that is typed is logged.

    Its ``run(sockets=[listening])`` serves until Ctrl-C.
    """
    config = uvicorn.Config(
        make_app(desk, port=listening.getsockname()[1]),
        log_level="warning",
        access_log=False,
        # X-Forwarded-For and its like are believed by default: there is no proxy here.
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)


def address(desk: Desk, listening: socket.socket) -> str:
    """Return the address with the secret, for the person who started it."""
    return f"http://{HOST}:{listening.getsockname()[1]}/?token={desk.secret}"


def _refusal(request: Request, hosts: set[str], cookie: str, secret: str) -> Response | None:
    """Return why a request is not answered; None if it is."""
    if request.headers.get("host", "") not in hosts:
        return _refused(421, "This page answers to its own address only.")
    origin = request.headers.get("origin")
    foreign = origin is not None and origin.removeprefix("http://") not in hosts
    site = request.headers.get("sec-fetch-site", "none")
    entering = request.url.path == "/" and request.method == "GET"
    if foreign or (site not in ("same-origin", "none") and not entering):
        return _refused(403, "Requests from other pages are refused.")
    if request.method == "POST":
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind != "application/json":
            return _refused(415, "Send JSON.")
    given = request.query_params.get("token") if entering else None
    given = given or request.cookies.get(cookie, "")
    if not secrets.compare_digest(utf8(given), utf8(secret)):
        return _refused(403, "Open the address that `fedrx assist` printed on the terminal.")
    return None


def _refused(status: int, text: str) -> Response:
    return Response(text + "\n", status_code=status, media_type="text/plain")


def _problem(problems: Mapping[str, str]) -> Response:
    return JSONResponse({"problems": dict(problems)}, status_code=422)


async def _body(request: Request) -> tuple[dict[str, Any], int]:
    """Read a small JSON object; also return how many of its texts had to be escaped.

    Raises:
        FormProblems: If it is none.
    """
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > _LARGEST_BODY_BYTES:
            raise FormProblems({"form": "This is too long."})
    try:
        value, escaped = writable(json.loads(content))
    except (ValueError, RecursionError):
        value, escaped = None, 0
    if not isinstance(value, dict):
        raise FormProblems({"form": "This is not a form."})
    return value, escaped
